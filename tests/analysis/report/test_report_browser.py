"""The report in headless Chromium: nothing fetched, nothing logged, numbers as in the JSON, and what can be clicked."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from test_report import HOSTILE, compare_content, explain_content

from mrla.analysis.report.page import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)
DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}
RENDERERS = "Bokeh.documents.flatMap(shown => shown.roots()).flatMap(plot => plot.renderers)"
# A report in a folder of its own, and its content.
Made = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        reason = f"no browser: none of {', '.join(NAMES)} is installed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium) -> Iterator[Callable[..., Any]]:
    """Opens a page; at the end of the test nothing may have been logged, fetched, or asked of the user."""
    contexts, wrong = [], []

    def open_page(path: Path, *, viewport: dict[str, int] = DESKTOP, **options: Any) -> Any:
        context = chromium.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url != path.as_uri() and wrong.append(f"fetched {request.url}"))
        page.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    # What begins with data: is in the page itself.
    assert [text for text in wrong if not text.startswith("fetched data:")] == []


def make(folder: Path, content: dict[str, Any], kind: Literal["compare", "explain"]) -> Made:
    # What is written is read from the file again, so that the page is held against the JSON that users have.
    (folder / f"{kind}.json").write_text(json.dumps(content, allow_nan=False))
    written = json.loads((folder / f"{kind}.json").read_text())
    return write_report(folder, written, kind=kind), written


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Made:
    return make(tmp_path_factory.mktemp("compared"), compare_content(), "compare")


@pytest.fixture(scope="module")
def explained(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("explained")
    return make(folder, explain_content(folder, signed=True, lengths=(2, 9)), "explain")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[Made, Made]:
    folder = tmp_path_factory.mktemp("hostile")
    explained = make(folder, explain_content(folder, name=HOSTILE), "explain")
    folder = tmp_path_factory.mktemp("hostile_compared")
    content = compare_content(("plain", HOSTILE), epochs=4)
    content["recipe"]["model"] = HOSTILE
    content["recipe"]["data"] = {"kind": "loaders", "root": HOSTILE}
    content["versions"][HOSTILE] = HOSTILE
    return make(folder, content, "compare"), explained


def look(page: Any, folder: Path, name: str) -> None:
    """Light, dark, on a phone and on paper: a picture of each, and no page that is wider than the window."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.screenshot(path=folder / f"{name}-{scheme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.set_viewport_size(PHONE)
    page.screenshot(path=folder / f"{name}-phone.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.emulate_media(media="print")
    page.screenshot(path=folder / f"{name}-print.png", full_page=True)
    page.emulate_media(media="screen", color_scheme="light")
    assert page.pdf(path=folder / f"{name}.pdf")[:5] == b"%PDF-"


@pytest.mark.parametrize(
    "content",
    [
        compare_content(),
        compare_content(("plain", "light"), detection=True, seeds=2),
        compare_content(("light", "base"), seeds=1, epochs=1),
    ],
    ids=["digits", "shapes", "one_seed"],
)
def test_comparison_opens_everywhere(opened, tmp_path, content):
    path, _ = make(tmp_path, content, "compare")
    page = opened(path)
    assert page.locator("canvas").count() >= 2
    look(page, tmp_path, "compare")


@pytest.mark.parametrize("without", [(), ("checkpoint", "baseline", "terms", "cuts", "method")], ids=["all", "little"])
def test_explanation_opens_everywhere(opened, tmp_path, without):
    content = explain_content(tmp_path, lengths=(2, 9), signed=True)
    if without:
        content |= dict.fromkeys(without)
        content["pictures"][0] |= {"drawing": None, "caption": None}
    path, _ = make(tmp_path, content, "explain")
    page = opened(path)
    assert page.locator("h2").count() == 4 + 3 * (not without)
    look(page, tmp_path, "explain")


def test_hostile_names_are_text(opened, hostile, compared, explained, tmp_path):
    count = "[document.scripts.length, document.images.length, document.querySelectorAll('[onerror]').length]"
    for (path, _), (peer, _) in zip(hostile, (compared, explained), strict=True):
        page = opened(path)
        assert page.evaluate(count) == opened(peer).evaluate(count)
        assert HOSTILE in page.locator("h1").text_content()
        look(page, tmp_path, "hostile")


def test_hostile_arm_is_text_in_the_hover_too(opened, hostile):
    path, content = hostile[0]
    page = opened(path)
    x, y = page.evaluate("""(() => {
        const plot = Bokeh.documents[1].roots()[0], { frame } = Bokeh.index.get_by_id(plot.id);
        const line = plot.renderers.filter(r => r.tags.slice(1).join() === "val,arm" && r.glyph.type === "Line")[0];
        const { data } = line.data_source;
        return [frame.x_scale.compute(data.epoch[2]), frame.y_scale.compute(data.mean[2])];
    })()""")
    panel = page.locator("#panel-1")
    panel.scroll_into_view_if_needed()
    box = panel.bounding_box()
    page.mouse.move(box["x"] + x - 3, box["y"] + y)
    page.mouse.move(box["x"] + x, box["y"] + y)
    hover = page.locator(".bk-tooltip-content")
    hover.wait_for()
    assert HOSTILE in hover.inner_text()
    assert f"{100 * np.mean([run[2]['val_accuracy'] for run in content['epochs'][HOSTILE]]):.4f}" in hover.inner_text()
    assert hover.locator("img, script").count() == 0


def test_scores_equal_the_json(opened, compared):
    path, content = compared
    page = opened(path)
    cells = page.eval_on_selector_all("td[data-key]", "cells => cells.map(c => ({...c.dataset, text: c.innerText}))")
    seen = set()
    for cell in cells:
        seen.add((cell["arm"], cell["key"]))
        entry = content["table"][cell["arm"]].get(cell["key"])
        if cell["key"] in ("macs", "images_per_second"):
            assert float(cell["value"]) == (entry if cell["key"] == "macs" else entry["median"])
        elif cell["key"] == "parameters":
            assert int(cell["value"]) == entry["trainable"] == int(cell["text"].replace(",", ""))
        elif cell["key"] == "difference":
            difference = content["differences"][cell["arm"]]
            assert float(cell["value"]) == difference["mean"]
            assert cell["text"] == f"{100 * difference['mean']:+.2f}"
        elif cell["key"] == "interval":
            difference = content["differences"][cell["arm"]]
            assert (float(cell["low"]), float(cell["high"])) == (difference["low"], difference["high"])
        else:
            assert float(cell["value"]) == entry["mean"]
            assert cell["text"] == f"{100 * entry['mean']:.2f} ± {100 * entry['sd']:.2f}"
    keys = {"train_accuracy", "val_accuracy", "best_val_accuracy", "parameters", "macs", "images_per_second"}
    assert seen >= {(arm, key) for arm in content["arms"] for key in keys}
    assert seen >= {(arm, key) for arm in ("light", "base") for key in ("difference", "interval")}
    verdicts = page.locator(".verdict")
    for index, (arm, difference) in enumerate(content["differences"].items()):
        text = verdicts.nth(index).inner_text()
        assert f"{arm} against plain: {difference['verdict']}" in text
        assert difference["reason"].removeprefix(f"{difference['verdict']}: ")[1:] in text
    first = page.evaluate("document.querySelector('.verdict').compareDocumentPosition(document.querySelector('table'))")
    assert first & 4  # the table follows


def test_cuts_and_maps_equal_the_json(opened, explained):
    path, content = explained
    page = opened(path)
    rows = page.eval_on_selector_all(
        "tr[data-cut]",
        "rows => rows.map(r => [r.dataset.cut, Object.fromEntries("
        "[...r.querySelectorAll('[data-key]')].map(c => [c.dataset.key, Number(c.dataset.value)]))])",
    )
    names = {
        "all": "{block}",
        "mixers": "{block}",
        "links": "{block} attending to {source}",
        "heads": "{block}, head {head}",
    }
    expected = {
        names[kind].format(**cut): {
            **{key: cut[key] for key in ("accuracy", "loss")},
            **{key: cut[key]["mean"] for key in ("accuracy_change", "loss_change")},
        }
        for kind in names
        for cut in ([content["cuts"][kind]] if kind == "all" else content["cuts"][kind])
    }
    assert dict(rows) == expected
    assert len(rows) == len(expected)
    shares = page.eval_on_selector_all("[data-key=share]", "cells => cells.map(c => Number(c.dataset.value))")
    assert shares == [term["share"] for term in content["terms"]]
    for index, chain in enumerate(content["chains"]):
        assert shown_map(page, index) == rounded(chain["mean"])
        page.locator("select").nth(index).select_option("head 1")
        assert shown_map(page, index) == rounded(chain["by_head"][1])
        page.locator("select").nth(index).select_option(f"image {content['pictures'][0]['file']}")
        assert shown_map(page, index) == rounded(content["pictures"][0]["retrieval"][index])
        page.locator("select").nth(index).select_option("mean over heads and images")
        assert shown_map(page, index) == rounded(chain["mean"])


def shown_map(page: Any, index: int) -> list[list[str | None]]:
    return (
        page.locator("table.map")
        .nth(index)
        .evaluate(
            "map => [...map.tBodies[0].rows].map(row => "
            "[...row.cells].slice(1).map(cell => cell.querySelector('b')?.innerText ?? null))"
        )
    )


def rounded(grid: list[list[float | None]]) -> list[list[str | None]]:
    return [[None if value is None else f"{value:.2f}" for value in row] for row in grid]


def test_an_arm_is_switched_off_and_on(opened, compared):
    page = opened(compared[0])
    shown = f"{RENDERERS}.filter(r => r.visible).map(r => r.tags.slice(0, 2).join(' '))"
    everything = page.evaluate(shown)
    assert {line.split()[0] for line in everything} == {"plain", "light", "base"}
    button = page.get_by_role("button", name="light")
    before = page.locator("#panel-1").screenshot()
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert {line.split()[0] for line in page.evaluate(shown)} == {"plain", "base"}
    assert page.locator("#panel-1").screenshot() != before
    page.get_by_role("button", name="training").press("Enter")
    assert set(page.evaluate(shown)) == {"plain val", "base val"}
    button.click()
    page.get_by_role("button", name="training").click()
    assert page.evaluate(shown) == everything


def test_a_box_zooms_in(opened, compared):
    page = opened(compared[0])
    ends = "Bokeh.documents[1].roots().map(p => [p.x_range.start, p.x_range.end])[0]"
    before = page.evaluate(ends)
    panel = page.locator("#panel-1")
    panel.scroll_into_view_if_needed()
    box = panel.bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.7 * box["height"], steps=4)
    page.mouse.up()
    after = page.evaluate(ends)
    assert before[0] < after[0] < after[1] < before[1]


def test_plots_take_the_colours_of_the_page(opened, compared):
    page = opened(compared[0], color_scheme="dark")
    line = f"{RENDERERS}.filter(r => r.tags[2] === 'baseline' && r.glyph.type === 'Line')[0].glyph.line_color"
    assert page.evaluate(line)["value"] == "#d3d6da"
    page.emulate_media(color_scheme="light")
    for _ in range(100):  # the page is told of the change a moment later
        if page.evaluate(line)["value"] == "#333333":
            break
        page.wait_for_timeout(50)
    else:
        pytest.fail("the plot kept its dark colours")


def test_paper_has_everything(opened, compared, explained):
    page = opened(compared[0])
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("img.paper").is_visible()
    assert not page.locator(".panels").is_visible()
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    page = opened(explained[0])
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("dl").first.is_visible()


def test_without_scripts_the_curves_are_a_picture(opened, compared):
    page = opened(compared[0], java_script_enabled=False)
    assert page.locator("img.paper").is_visible()
    assert not page.locator(".live").is_visible()
    assert page.locator("td[data-key]").count() > 10


def test_a_script_that_slipped_in_does_not_run(chromium, compared, tmp_path):
    page = chromium.new_page()
    slipped = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\"></main>"
    (tmp_path / "slipped.html").write_text(compared[0].read_text().replace("</main>", slipped))
    page.goto((tmp_path / "slipped.html").as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.title() != "run"
    page.close()
