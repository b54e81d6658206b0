"""The site builds without a warning, its links lead somewhere, and a browser shows it without a fault."""

import importlib.util
import inspect
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parents[2] / "docs"
LOOKED_AT = (
    "index.html",
    "start.html",
    "tasks/classify_your_images.html",
    "tasks/compare.html",
    "how_it_works/maths.html",
    "notebooks/what_it_retrieves.html",
    "reference/generated/mrla.ops.html",
    "zh/quickstart.html",
)
"""The pages that are opened in a browser, on a desktop and on a phone."""


def module_of(path: Path) -> Any:
    """A file of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILD, REFERENCE = module_of(DOCS / "build.py"), module_of(DOCS / "extensions" / "reference_pages.py")


@pytest.mark.sweep
def test_the_site():
    """One test, for it is built once: notebooks run, warnings are errors, links lead somewhere, a browser shows it."""
    chromium = shutil.which("chromium")
    assert BUILD.build() == 0
    assert list(BUILD.broken_links(BUILD.SITE)) == []
    if chromium is None:
        assert not os.environ.get("CI"), "chromium is not installed"
        return
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width in (1280, 390):
            for scheme in ("light", "dark"):
                check_in(browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), width)
        browser.close()


def check_in(page: Page, width: int) -> None:
    """No message of an error, nothing wider than the window, text that stands out from its ground."""
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url))
    for name in LOOKED_AT:
        page.goto((BUILD.SITE / name).as_uri())
        if page.evaluate("document.documentElement.scrollWidth") > width:
            problems.append("wider than the window")
        problems += page.evaluate(CONTRAST)
        assert problems == [], (name, width)


def test_a_link_to_nowhere_is_found(tmp_path):
    (tmp_path / "other.html").write_text('<h1 id="there">x</h1>')
    (tmp_path / "index.html").write_text(
        '<a href="other.html#there">right</a><a href="other.html#gone">x</a><a href="lost.html">x</a>'
        '<a href="https://example.org/x">outside</a><img src="lost.png">'
    )
    assert list(BUILD.broken_links(tmp_path)) == [
        f"index.html: {link}" for link in ("other.html#gone", "lost.html", "lost.png")
    ]


CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const part = value => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const ground = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] > 250) return colour;
    }
    return [255, 255, 255, 255];
  };
  const texts = ['p', 'li', 'td', 'th', 'h1', 'h2', 'h3', 'pre', 'pre span', 'code', 'a'];
  const found = new Set();
  for (const element of document.querySelectorAll(texts.map(name => '.bd-article ' + name).join(', '))) {
    if (!element.textContent.trim() || !element.offsetParent) continue;
    const [text, behind] = [rgba(getComputedStyle(element).color), ground(element)].map(luminance);
    const ratio = (Math.max(text, behind) + 0.05) / (Math.min(text, behind) + 0.05);
    if (ratio < 4.5) {
      found.add(`${element.tagName} ${ratio.toFixed(2)}: ${element.textContent.trim().slice(0, 40)}`);
    }
  }
  return [...found].slice(0, 5);
}"""
"""Every text of the article whose contrast to its ground is below 4.5, which WCAG asks for."""


# What is documented


def lacking(name: str, found: Any) -> Iterator[str]:
    """What the docstring of a public name has not: a text; of a function every argument, the result, an example."""
    is_called = inspect.isclass(found) or inspect.isroutine(found)
    text = inspect.getdoc(found) if is_called else "".join(REFERENCE.constant_text(name.rpartition(".")[2], found))
    if not text:
        yield f"{name}: no docstring"
    elif inspect.isfunction(found):
        signature = inspect.signature(found)
        for argument in signature.parameters:
            if not re.search(rf"^    {argument}\b.*:", text, re.MULTILINE):
                yield f"{name}: the argument {argument}"
        if signature.return_annotation is not None and not re.search("^(Returns|Yields):", text, re.MULTILINE):
            yield f"{name}: what is returned"
        if not re.search("^Example:", text, re.MULTILINE):
            yield f"{name}: an example"


def test_every_public_name_is_documented():
    public = {
        f"{module}.{name}": found
        for module, names in REFERENCE.documented_names().items()
        for name, found in names.items()
    }
    assert len(public) > 100
    assert [problem for name, found in public.items() for problem in lacking(name, found)] == []


def test_a_docstring_that_lacks_something_is_found():
    def public(size: int) -> int:
        """Doubles a number.

        Returns:
            Twice the number.
        """
        return 2 * size

    assert list(lacking("public", public)) == ["public: the argument size", "public: an example"]
