"use strict";
// Plots are drawn on a canvas, which style sheets do not reach: they take the page's colours here. On paper a still stands
// in for them, since a canvas cannot be drawn anew while the browser prints.
const contentOf = (id) => JSON.parse(document.getElementById(id)?.textContent ?? "[]");
const plots = () => (window.Bokeh ? Bokeh.documents.flatMap((shown) => shown.roots()) : []);

function colourPlots() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  for (const plot of plots()) {
    for (const axis of [...plot.below, ...plot.left]) {
      axis.major_label_text_color = axis.axis_label_text_color = colour("--quiet");
    }
    for (const grid of plot.center) grid.grid_line_color = grid.dimension === 1 ? colour("--rule") : null;
    for (const renderer of plot.renderers.filter((one) => one.tags[2] === "baseline")) {
      const { glyph } = renderer;
      for (const property of ["line_color", "fill_color"]) if (property in glyph) glyph[property] = { value: colour("--baseline") };
    }
  }
}

function showChosen() {
  const off = [...document.querySelectorAll(".legend [aria-pressed=false]")];
  const hidden = (kind, name) => off.some((button) => button.dataset[kind] === name);
  for (const plot of plots()) {
    for (const renderer of plot.renderers) {
      const [arm, part] = renderer.tags;
      renderer.visible = !hidden("arm", arm) && !hidden("part", part);
    }
  }
}

function showMap(select, others) {
  const table = select.closest("figure").querySelector("table"), { digits, scale } = table.dataset;
  const mean = select.value === "mean";
  table.classList.toggle("one-map", !mean);
  [...table.tBodies[0].rows].forEach((row, block) => {
    [...row.cells].slice(1).forEach((cell, source) => {
      if (cell.classList.contains("deaf")) return;
      const value = mean ? Number(cell.dataset.value) : others[Number(select.value)].grid[block][source];
      const share = Number(scale) ? Math.abs(value) / Number(scale) : 0;
      cell.querySelector("b").textContent = value.toFixed(Number(digits));
      cell.style.setProperty("--share", share.toFixed(3));
      cell.classList.toggle("below", value < 0);
      cell.dataset.title ??= cell.title;
      cell.title = mean ? cell.dataset.title : value.toFixed(4);
    });
  });
}

for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    showChosen();
  });
}
const otherMaps = contentOf("other-maps");
for (const select of document.querySelectorAll("select[data-map]")) {
  select.addEventListener("change", () => showMap(select, otherMaps[Number(select.dataset.map)]));
}
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", colourPlots);

function drawPlots() {
  return Promise.all(contentOf("panels").map((item, index) => Bokeh.embed.embed_item(item, `panel-${index}`))).then(() => {
    // Under a finger a box would stand in the way of scrolling the page.
    if (matchMedia("(pointer: coarse)").matches) for (const plot of plots()) plot.toolbar.active_drag = null;
    colourPlots();
    showChosen();
    document.documentElement.dataset.ready = "yes";
  });
}

// The verdict and the tables are there at once; plots take the longest, and come when the page has opened.
addEventListener("load", () => setTimeout(drawPlots));
