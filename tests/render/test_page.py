"""The page of `kasa inspect spectrum`, used as a person would use it, in a browser without a network.

KASA_BROWSER names the browser; KASA_REQUIRE_BROWSER=1 makes its absence a failure.
"""

import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kasa_cli.render.page import embedded, html
from tests.builders import spectrum_reports

IS_REQUIRED = os.environ.get("KASA_REQUIRE_BROWSER") == "1"
if not IS_REQUIRED:
    pytest.importorskip("playwright", reason="no playwright: pip install playwright")
from playwright import sync_api as playwright  # noqa: E402

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
HOSTILE = "encoder.layer.0.<img src=x onerror='owned()'></script>\"&\u2028<!--"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def executable(chromium) -> str | None:
    """The browser to use: the one named, one on PATH, or playwright's own."""
    named = os.environ.get("KASA_BROWSER")
    on_path = (shutil.which(name) for name in ("chromium", "google-chrome", "chromium-browser"))
    own = chromium.executable_path
    return named or next(filter(None, on_path), None) or (own if Path(own).exists() else None)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        path = executable(driver.chromium)
        if path is None:
            reason = (
                "no browser: install chromium, name one in KASA_BROWSER, or run `playwright install chromium`"
            )
            (pytest.fail if IS_REQUIRED else pytest.skip)(reason)
        launched = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Pages by name: a small model with a hostile name and a singular weight in it, and a large one."""
    folder = tmp_path_factory.mktemp("pages")
    reports = {"small": tricky(), "large": spectrum_reports.llama(80)}
    for name, report in reports.items():
        (folder / f"{name}.html").write_text(html(report), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in reports}


def tricky():
    """Three layers of three types, a hostile name, a weight of rank 5, and a figure that was not measured."""
    kinds = {"attention.query": (48, 48), "attention.key": (48, 48), "mlp.up": (96, 48)}
    report = spectrum_reports.report(3, kinds, "encoder.layer")
    curves = {curve.name: curve for curve in report.curves}
    rows = [replace(report.tensors[0], power_law_alpha=None), *report.tensors[1:]]
    both = [(row, curves[row.name]) for row in rows]
    both.append(spectrum_reports.singular("encoder.layer.1.pooled.dense", "pooled.dense", (48, 40), 5))
    both.append(spectrum_reports.singular(HOSTILE, HOSTILE.removeprefix("encoder.layer.0."), (48, 40), 30))
    return spectrum_reports.of(both, model=f"a/{HOSTILE}", notes=(HOSTILE,))


@pytest.fixture
def visit(browser, files):
    """Open a page; at the end, assert that it sent no request and logged no error."""
    contexts, asked, complaints = [], [], []

    def go(name="small", viewport=DESKTOP, scheme="light"):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        context.route(re.compile("^(?!file:)"), lambda route: route.abort())
        page.goto(files[name].as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield go
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith("file:")] == []
    assert complaints == []


def cells(page):
    return page.locator("#heat .role-mark.mark-rect > path")


def fills(page) -> list[str]:
    return cells(page).evaluate_all("all => all.map(cell => cell.getAttribute('fill'))")


def legend(page) -> str:
    return page.locator("#heat .role-legend").first.text_content()


def column(page, key: str) -> list[str]:
    """The visible cells of a column of the table, from top to bottom."""
    heads = page.locator("#weights th").evaluate_all("all => all.map(head => head.dataset.key)")
    of = heads.index(key)
    return page.locator("#weights tbody tr:not([hidden])").evaluate_all(
        f"all => all.map(r => r.cells[{of}].innerText)"
    )


def figures(texts: list[str]) -> list[float]:
    plain = [text.rstrip("▲▼ \n").replace(",", "").replace("∞", "inf") for text in texts]
    return [float(text) for text in plain if text != "–"]


def background(page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_another_quantity_changes_colours_and_legend(visit):
    page = visit()
    before, said = fills(page), legend(page)
    assert "Condition number" in said
    page.select_option("#quantity", "stable_rank")
    page.wait_for_function("document.querySelector('#heat .role-legend').textContent.includes('Stable rank')")
    assert len(fills(page)) == len(before)
    assert sum(a != b for a, b in zip(before, fills(page), strict=True)) > len(before) // 2
    assert "‖W‖₂²" in page.text_content("#meaning")


def test_every_quantity_can_be_drawn(visit):
    page = visit()
    keys = page.locator("#quantity option").evaluate_all("all => all.map(one => one.value)")
    assert {"kappa", "sigma_min", "entropy", "mp_above", "power_law_alpha", "energy_8"} <= set(keys)
    for key in keys:
        page.select_option("#quantity", key)
        page.wait_for_function(
            "count => document.querySelectorAll('#heat .role-mark.mark-rect > path').length == count", arg=11
        )


def test_what_no_scale_holds_is_shown_and_named(visit):
    page = visit()
    assert "infinite: singular" in page.text_content("#heat")
    assert (
        page.locator("#heat .mark-text text", has_text="∞").count() == 3
    )  # two cells, one line of the legend
    page.select_option("#quantity", "power_law_alpha")
    page.wait_for_function("document.querySelector('#heat').textContent.includes('not measured')")


def test_a_click_on_a_cell_draws_its_curve_and_edge_and_another_takes_them_away(visit):
    page = visit()
    lines, rules = (
        page.locator("#curves .role-mark.mark-line path"),
        page.locator("#curves .role-mark.mark-rule line"),
    )
    assert (lines.count(), rules.count()) == (2, 1)  # the worst has no noise, and no edge
    free = page.locator(".pick[aria-pressed=false]").first
    number = free.get_attribute("value")
    cell = page.locator("#heat .role-mark.mark-rect > path").nth(int(number))
    cell.click(force=True)  # its figure is written over it
    page.wait_for_function("document.querySelectorAll('#curves .role-mark.mark-line path').length == 3")
    assert (rules.count(), page.locator("#chosen button").count()) == (2, 3)
    assert page.locator(f".pick[value='{number}']").get_attribute("aria-pressed") == "true"
    assert cell.get_attribute("stroke") == "#1b1f24"
    page.locator("#chosen button").last.click()
    page.wait_for_function("document.querySelectorAll('#curves .role-mark.mark-line path').length == 2")


def test_zeros_left_off_the_log_axis_are_counted(visit):
    page = visit()
    assert "points are 0 and on no log axis" in page.text_content(
        "#chosen"
    )  # the worst κ is the singular one


def test_nine_spectra_are_refused_not_dropped(visit):
    page = visit()
    for _ in range(7):
        page.locator(".pick[aria-pressed=false]").first.click()
    assert page.locator("#chosen button").count() == 8
    assert "8 spectra at most" in page.text_content("#status")


@pytest.mark.parametrize("key", ["kappa", "sigma_min"])
def test_the_table_sorts_by_number_both_ways(visit, key):
    page = visit()
    head = page.locator(f"th[data-key={key}]")
    head.locator("button").click()
    up = figures(column(page, key))
    assert head.get_attribute("aria-sort") == "ascending" and up == sorted(up)
    head.locator("button").focus()
    page.keyboard.press("Enter")
    down = figures(column(page, key))
    assert head.get_attribute("aria-sort") == "descending" and down == sorted(down, reverse=True)
    assert page.locator("th[aria-sort]").count() == 1


def test_infinity_sorts_as_the_largest_and_what_was_not_measured_comes_last(visit):
    page = visit()
    page.click("th[data-key=kappa] button")
    assert figures(column(page, "kappa"))[-2:] == [math.inf, math.inf]
    for _ in range(2):
        page.click("th[data-key=power_law_alpha] button")
        assert column(page, "power_law_alpha")[-1] == "–"


def test_search_leaves_the_rows_that_match_and_dims_the_other_cells(visit):
    page = visit()
    page.fill("#search", "MLP.up")
    assert column(page, "kind") == ["up"] * 3
    assert page.text_content("#count") == "3 of 11"
    page.wait_for_function(
        "document.querySelectorAll('#heat .role-mark.mark-rect > path[opacity=\"0.15\"]').length == 8"
    )


def test_the_theme_follows_the_system_and_the_button(visit):
    page = visit()
    light = background(page)
    page.click("#theme")
    page.wait_for_function("getComputedStyle(document.body).backgroundColor != 'rgb(255, 255, 255)'")
    assert light == "rgb(255, 255, 255)" and background(page) == background(visit(scheme="dark"))
    assert page.locator("#heat .role-axis text").first.get_attribute("fill") == "#a2abb5"


def test_names_stay_names(visit):
    page = visit()
    assert page.locator("img").count() == 0 and page.title().startswith("Spectrum of a/encoder")
    assert "<img src=x" in page.text_content("h1") and "<img src=x" in page.text_content(".note")
    assert page.locator("#heat .role-axis text", has_text="<img src=x").count() == 1
    cells(page).last.hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert page.locator("#vg-tooltip-element img").count() == 0


def test_the_policy_stops_a_script_that_was_not_there_when_the_page_was_made(browser, files, tmp_path):
    source = (
        files["small"]
        .read_text(encoding="utf-8")
        .replace("</main>", "<script>window.owned = 1</script></main>")
    )
    (tmp_path / "page.html").write_text(source, encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate("window.owned") is None
    page.close()


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_is_wider_than_the_screen(visit, name, viewport):
    page = visit(name, viewport)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    for chart in ("#heat", "#curves"):
        assert page.locator(f"{chart} svg").bounding_box()["width"] > 0.8 * min(viewport["width"] / 2.4, 350)


def test_a_large_model_answers(visit, files):
    page = visit("large")
    assert cells(page).count() == 560
    page.select_option("#quantity", "sigma_min")
    page.wait_for_function("document.querySelector('#heat .role-legend').textContent.includes('Smallest')")
    page.click("th[data-key=kappa] button")
    kappas = figures(column(page, "kappa"))
    assert kappas == sorted(kappas) or kappas == sorted(kappas, reverse=True)
    assert files["large"].stat().st_size < 2.5e6


def test_a_report_of_nothing_is_a_page_too():
    assert "0 weights" in html(replace(tricky(), tensors=(), curves=()))


def test_data_survives_in_a_script_element():
    text = embedded([HOSTILE])
    assert json.loads(text) == [HOSTILE]
    assert not set("<>&\u2028") & set(text)


def test_a_page_to_be_shared_does_not_tell_where_the_model_lay():
    report = spectrum_reports.minilm()
    for given, shown in (("/home/ada/models/tiny", "tiny"), ("../tiny", "tiny"), ("org/tiny", "org/tiny")):
        made = html(replace(report, model=given))
        assert f"<h1>{shown}</h1>" in made
        assert "/home/ada" not in made and "../tiny" not in made
