"""The page of a search that has ended: its chart, the point in hand, its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine

from tests.api import examples
from tests.browser.conftest import Photograph, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Page

POINT = "#chart .scatterlayer .point"
# Where a point of the frontier is on the screen.
PLACE = """(at) => { const chart = document.getElementById('chart'), {xaxis, yaxis} = chart._fullLayout;
    const trace = chart.data.find(({ name }) => name === 'frontier'), box = chart.getBoundingClientRect();
    return { number: trace.customdata[at], x: box.left + xaxis._offset + xaxis.d2p(trace.x[at]),
             y: box.top + yaxis._offset + yaxis.d2p(trace.y[at]) }; }"""


@pytest.fixture
def search(served: str, page: Page, engine: Engine) -> str:
    """The address of a finished search, whose page is open with its chart drawn."""
    address = f"{served}/searches/{examples.finished_search(engine)}"
    page.goto(address)
    page.wait_for_selector(POINT)
    return address


def selected(page: Page, number: int) -> None:
    """Wait until a point is in hand: in the panel, in the table, on the chart and in the address."""
    page.locator(f"#selected[data-point='{number}']").wait_for()
    wait_until(page, f"new URLSearchParams(location.search).get('point') === '{number}'")
    wait_until(page, f"document.querySelector('#points tr[aria-current]')?.dataset.point === '{number}'")
    wait_until(page, f"document.getElementById('chart').layout.annotations.at(-1).name === 'point {number}'")


def shown(page: Page, attribute: str = "name") -> list[Any]:
    found: list[Any] = page.evaluate(f"document.getElementById('chart').data.map((trace) => trace.{attribute})")
    return found


def test_a_click_selects_a_point_and_a_double_click_opens_it(search: str, page: Page) -> None:
    place = page.evaluate(PLACE, 1)
    page.mouse.move(place["x"], place["y"])
    page.locator("#chart .hovertext").get_by_text(f"Point {place['number']}").wait_for()
    page.mouse.click(place["x"], place["y"])
    selected(page, place["number"])
    page.reload()
    page.wait_for_selector(POINT)
    selected(page, place["number"])
    page.get_by_role("link", name=f"Open point {place['number']}").wait_for()
    place = page.evaluate(PLACE, 2)
    page.mouse.dblclick(place["x"], place["y"])
    page.wait_for_url(f"{search}/points/{place['number']}")


def test_the_keyboard_selects_a_point_and_reaches_its_vllm_file(search: str, page: Page) -> None:
    best = int(page.locator("#selected").get_attribute("data-point") or -1)
    page.get_by_role("link", name="← Cheaper").press("Enter")
    selected(page, best - 1)
    page.get_by_role("link", name="Best").press("Enter")
    selected(page, best)
    for step in ("Best", "Better →", "← Cheaper"):
        assert page.get_by_role("link", name=step).count() == (step == "← Cheaper")
    assert page.evaluate("document.activeElement.closest('#selected') !== null"), "the keyboard stays in the panel"
    page.locator("#selected h3 a").press("Enter")
    page.wait_for_url(f"{search}/points/{best}")
    assert page.locator("table.grid td.cell").count() == 36
    with page.expect_download() as downloading:
        page.get_by_role("link", name="Download vllm").press("Enter")
    config = json.loads(Path(downloading.value.path()).read_text())
    assert config["quant_method"] == "compressed-tensors"
    page.reload()
    assert page.locator("table.grid td.cell").count() == 36


def test_axes_and_scales_are_chosen_and_what_was_expected_is_shown_on_demand(search: str, page: Page) -> None:
    drawn = {number for numbers in shown(page, "customdata") for number in numbers or ()}
    listed = page.locator("#points tr[data-point]").evaluate_all("(rows) => rows.map((row) => +row.dataset.point)")
    assert set(listed) <= drawn, "the chart has what the table has"
    page.get_by_label("Size").check(force=True)
    wait_until(page, "document.querySelector('#chart .xtitle').textContent.includes('size')")
    assert "budget 40" in page.locator("#chart").inner_text()
    page.get_by_label("Log quality").uncheck(force=True)
    wait_until(page, "document.getElementById('chart')._fullLayout.yaxis.type === 'linear'")
    page.get_by_label("Log cost").check(force=True)
    wait_until(page, "document.getElementById('chart')._fullLayout.xaxis.type === 'log'")
    assert page.locator("#chart .xtick").all_text_contents() == ["30", "32", "34"], "whole numbers within a decade"
    assert "expected before measuring" not in shown(page)
    page.get_by_label("Expected").check(force=True)
    wait_until(page, "document.getElementById('chart').data.some(({ name }) => name.startsWith('expected'))")
    assert page.locator("#chart .errorbar").count() > 10


def test_the_address_keeps_the_axes_and_scales_whatever_else_changes_on_the_page(search: str, page: Page) -> None:
    layout = "document.getElementById('chart')._fullLayout"
    drawn = f"(({{ xaxis, yaxis }}) => [xaxis.title.text.includes('size'), xaxis.type, yaxis.type].join())({layout})"
    assert page.evaluate("location.hash") == "", "what is usual needs no words"
    page.get_by_label("Size").check(force=True)
    page.get_by_label("Log cost").check(force=True)
    page.get_by_label("Log quality").uncheck(force=True)
    wait_until(page, f"{drawn} === 'true,log,linear'")
    page.get_by_role("columnheader", name="Loss").get_by_role("link").press("Enter")
    page.locator("th[aria-sort=ascending]", has_text="Loss").wait_for()
    wait_until(page, "location.search.includes('sort=loss') && location.hash.includes('logX=true')")
    page.reload()
    wait_until(page, f"{layout} && {drawn} === 'true,log,linear'")
    assert page.get_by_label("Log cost").is_checked()
    page.get_by_label("Log cost").uncheck(force=True)
    wait_until(page, "!location.hash.includes('logX')")
    page.goto(f"{search}?point=0#x=toString&logX=perhaps&expected=true")
    page.reload()
    wait_until(page, f"{layout} && {drawn} === 'false,linear,log'")
    assert page.get_by_label("Expected").is_checked()


def test_the_table_is_sorted_and_shows_groups_on_demand(search: str, page: Page) -> None:
    head = page.get_by_role("columnheader", name="Loss")
    head.get_by_role("link").press("Enter")
    page.locator("th[aria-sort=ascending]", has_text="Loss").wait_for()
    assert page.evaluate("document.activeElement.textContent") == "Loss", "the keyboard stays where it was"
    page.keyboard.press("Enter")
    page.locator("th[aria-sort=descending]", has_text="Loss").wait_for()
    losses = [float(text) for text in page.locator("#points tbody td:nth-child(2)").all_inner_texts()]
    assert losses == sorted(losses, reverse=True)
    before = len(losses)
    page.get_by_label("Searched only").check(force=True)
    page.get_by_text("on the calibration data others did better at their cost").wait_for()
    assert page.locator("#points tr[data-point]").count() == before + 5
    page.reload()
    assert page.locator("#points tr[data-point]").count() == before + 5, "the address keeps what was chosen"
    page.locator("#points tbody tr", has_text="uniform w4a16g64").locator("td").first.click()
    selected(page, 0)
    page.locator("#points").get_by_role("link", name="uniform w4a16g64").press("Enter")
    page.wait_for_url("**/points/0")


def test_without_script_the_page_shows_the_point_and_the_order_of_its_address(
    served: str, page: Page, engine: Engine
) -> None:
    search_id = examples.finished_search(engine)
    context = page.context.browser.new_context(java_script_enabled=False)  # type: ignore[union-attr]
    plain = context.new_page()
    plain.goto(f"{served}/searches/{search_id}?point=4&sort=loss&order=desc&show=frontier")
    assert plain.locator("#selected h3 a").inner_text() == "Point 4"
    assert plain.locator("th[aria-sort=descending]").inner_text() == "Loss"
    plain.get_by_role("link", name="Better →").click()
    plain.wait_for_url("**point=5**")
    assert plain.locator("#selected h3 a").inner_text() == "Point 5"
    context.close()


def test_screenshots(search: str, page: Page, photograph: Photograph) -> None:
    photograph("search")
