"""The report in a real browser: it loads in silence, does what it says, and can be used by everyone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import streamlens as sl

sync_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

MODEL = Path(__file__).resolve().parents[1] / "fixtures" / "model.pt"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
POSITIONS = 12

if os.environ.get("STREAMLENS_BROWSER") != "required":
    pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    sl.capture(MODEL, out=folder / "model.h5", max_tokens=1024, progress=False).close()
    given: dict[str, Any] = {"against": folder / "model.h5", "positions": range(POSITIONS), "progress": False}
    return sl.report(folder / "model.h5", **given).as_uri()


@pytest.fixture(params=[(1280, "light"), (400, "light"), (1280, "dark"), (400, "dark")], ids=lambda p: f"{p[0]}-{p[1]}")
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    width, scheme = request.param
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened.heard, opened.asked = [], []
    opened.on("console", lambda message: opened.heard.append(message.text))
    opened.on("pageerror", lambda error: opened.heard.append(str(error)))
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.goto(address)
    yield opened
    opened.close()


def test_it_loads_in_silence_and_asks_for_nothing(page: Any, address: str) -> None:
    assert page.heard == []
    assert page.asked == [address]


def test_the_page_is_no_wider_than_the_window(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_every_figure_is_within_its_column(page: Any) -> None:
    found = page.evaluate("""[...document.querySelectorAll("figure.drawn svg")].map((svg) => {
        const [own, column] = [svg.getBoundingClientRect(), svg.closest("main").getBoundingClientRect()];
        return [own.left >= column.left, own.right <= column.right, own.width > 200, own.height > 50];
    })""")
    assert len(found) >= 6
    assert all(all(one) for one in found)
    assert page.evaluate("[...document.querySelectorAll('figure')].every((f) => f.scrollWidth <= f.clientWidth)")


def test_no_letter_of_a_track_is_cut_off(page: Any) -> None:
    for large in (49_038, 262_143):
        cut = page.evaluate(
            """(large) => [...document.querySelectorAll(".detail svg")].flatMap((svg) => {
            const number = svg.querySelectorAll("text")[2];
            number.textContent = String(large);
            return [...svg.querySelectorAll("text")].filter((t) => {
                const [own, all] = [t.getBoundingClientRect(), svg.getBoundingClientRect()];
                return own.left < all.left - 0.5 || own.right > all.right + 0.5;
            }).map((t) => t.textContent);
        })""",
            large,
        )
        assert cut == []


def test_hover_shows_the_likeliest_five_and_leaving_shows_the_chosen_cell(page: Any) -> None:
    chosen = page.locator("#lens-heading").inner_text()
    page.locator("td[data-s='3'][data-p='4']").hover()
    assert "x_3 " in page.locator("#lens-heading").inner_text()
    assert "position 4" in page.locator("#lens-heading").inner_text()
    assert page.locator("#lens-top tr").count() == 5
    page.locator("h1").hover()
    assert page.locator("#lens-heading").inner_text() == chosen


def test_a_click_follows_the_token_through_the_layers(page: Any) -> None:
    cell = page.locator("td[data-s='16'][data-p='5']")
    cell.click()
    assert cell.get_attribute("aria-selected") == "true"
    first = page.locator("#lens-top button").first.inner_text()
    assert page.locator("#lens-followed").inner_text() == f"{first} through the layers"
    states = page.evaluate("JSON.parse(document.getElementById('lens-data').textContent).labels.length")
    assert page.locator("#lens-rank path.track").get_attribute("d").count("L") == states - 1
    other = page.locator("#lens-others button").nth(2)
    other.click()
    assert page.locator("#lens-followed").inner_text() == f"{other.inner_text()} through the layers"
    assert other.get_attribute("aria-pressed") == "true"


def test_the_keyboard_reaches_every_cell(page: Any) -> None:
    page.locator("td[data-s='16'][data-p='0']").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "PageDown"):
        page.keyboard.press(key)
    assert "x_7 " in page.locator("#lens-heading").inner_text()
    assert "position 2" in page.locator("#lens-heading").inner_text()
    page.keyboard.press("End")
    assert f"position {POSITIONS - 1}" in page.locator("#lens-heading").inner_text()
    page.keyboard.press("Enter")
    assert page.locator("#lens-followed").inner_text().endswith("through the layers")
    assert page.locator("table.grid td[tabindex='0']").count() == 1


def test_the_metric_changes_colours_and_scale(page: Any) -> None:
    def shades() -> list[str]:
        return list(
            page.eval_on_selector_all("table.grid td", "cells => cells.map(c => c.style.getPropertyValue('--v'))")
        )

    seen = {}
    for metric in ("kl", "entropy", "rank", "probability"):
        page.locator(f"input[value={metric}]").check()
        seen[metric] = (shades(), page.locator("#scale-high").inner_text())
    assert len({str(shade) for shade, _ in seen.values()}) == 4
    assert len({end for _, end in seen.values()}) == 4
    assert all(0 <= float(v) <= 1 for shade, _ in seen.values() for v in shade)
    last_row = len(seen["kl"][0]) // (seen["kl"][0].__len__() // POSITIONS)
    assert {float(v) for v in seen["kl"][0][:last_row]} == {0.0}, "the last state does not differ from itself"


def test_a_table_opens_and_can_be_downloaded(page: Any) -> None:
    page.locator("#ablation summary").click()
    with page.expect_download() as started:
        page.locator("#ablation a[download]").click()
    text = Path(started.value.path()).read_text("utf-8")
    assert text.startswith("drop,")
    assert text.count("\n") == 1 + page.locator("#ablation table.data tbody tr").count()


def test_everyone_can_use_it(page: Any) -> None:
    for summary in page.locator("summary").all():
        summary.click()
    found = axe.Axe().run(page).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"][:120]) for v in found if v["impact"] in ("serious", "critical")] == []
