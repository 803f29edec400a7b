"""The permalink of a point in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Engine

from api.app import create_app
from tests.api import examples
from tests.api.conftest import OPEN, serving
from tests.browser.conftest import PHONE, Photograph, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Page

POINT = "/searches/1/points/8"
CONFIG = f"/v1{POINT}/config?format="


@pytest.fixture(scope="module")
def served(own_engine: Engine) -> Iterator[str]:
    """The URL of a server with two searches, the second of a thousand layers."""
    examples.finished_search(own_engine)
    examples.deep_search(own_engine, 167, model="deep")
    with serving(create_app(own_engine, OPEN)) as url:
        yield url


@pytest.fixture
def opened(served: str, page: Page) -> Page:
    page.goto(served + POINT)
    return page


def clipboard(page: Page) -> str:
    return str(page.evaluate("navigator.clipboard.readText()"))


def test_copying_puts_the_command_and_the_file_on_the_clipboard(served: str, opened: Page) -> None:
    opened.get_by_role("button", name="Copy the command of vllm").click()
    opened.get_by_role("button", name="Copied").wait_for()
    command = opened.locator("#command-vllm").inner_text()
    assert command.startswith("bitfrontier apply 1 --point 8 --output ")
    assert clipboard(opened) == command
    opened.get_by_role("button", name="Copy file of json").press("Enter")
    wait_until(opened, "document.getElementById('copied').textContent === 'Copied'")
    answer = opened.request.get(f"{served}{CONFIG}json").text()
    wait_until(opened, "navigator.clipboard.readText().then((text) => text.startsWith('{'))")
    assert clipboard(opened) == answer
    opened.get_by_role("button", name="Copy the command of vllm").wait_for()


def test_where_the_browser_keeps_its_clipboard_the_old_way_copies(served: str, page: Page) -> None:
    page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.goto(served + POINT)
    page.get_by_role("button", name="Copy the command of json").click()
    page.get_by_role("button", name="Copied").wait_for()
    area = "document.body.append(Object.assign(document.createElement('textarea'), { id: 'paste' }))"
    page.evaluate(area)
    page.locator("#paste").focus()
    page.keyboard.press("Control+V")
    assert page.locator("#paste").input_value() == page.locator("#command-json").inner_text()


def test_a_download_is_what_the_interface_answers(served: str, opened: Page) -> None:
    for name, filename in (("vllm", "quantization_config.json"), ("csv", "bitfrontier.csv")):
        with opened.expect_download() as downloading:
            opened.get_by_role("link", name=f"Download {name}", exact=True).press("Enter")
        assert downloading.value.suggested_filename == filename
        answer = opened.request.get(f"{served}{CONFIG}{name}").body()
        assert Path(downloading.value.path()).read_bytes() == answer


def test_arrow_keys_walk_the_layers_and_name_them(opened: Page) -> None:
    # Tab comes to the first layer only: the others are reached by arrows.
    reached = "document.activeElement.matches('table.grid td.cell')"
    for _ in range(40):
        opened.keyboard.press("Tab")
        if opened.evaluate(reached):
            break
    readout = opened.locator(".readout")
    assert readout.inner_text().startswith("encoder.layer.0.attention.self.query w")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        opened.keyboard.press(key)
    assert readout.inner_text().startswith("encoder.layer.1.attention.self.key w")
    opened.keyboard.press("ArrowUp")
    opened.keyboard.press("ArrowUp")
    assert readout.inner_text().startswith("encoder.layer.1.attention.self.query w"), "there is nothing above"
    opened.keyboard.press("Tab")
    assert not opened.evaluate(reached)
    opened.locator("table.grid tbody tr").last.locator("td").last.hover()
    assert readout.inner_text().startswith("encoder.layer.5.output.dense w")


def test_layers_that_differ_from_a_neighbour_are_outlined(opened: Page) -> None:
    outlined = "[...document.querySelectorAll('td.cell')].filter((cell) => getComputedStyle(cell).boxShadow !== 'none')"
    assert opened.evaluate(f"{outlined}.length") == 0
    opened.get_by_role("radio", name="point 9").check(force=True)
    told = int(opened.locator("table.differences tr", has_text="Better: point 9").locator("td").last.inner_text())
    assert opened.evaluate(f"{outlined}.length") == told > 0
    opened.keyboard.press("ArrowRight")
    assert opened.get_by_role("radio", name="uniform w4a16g64").is_checked()
    assert opened.evaluate(f"{outlined}.length") == opened.locator("td.cell.differs-uniform").count() > told


def test_the_permalink_holds_and_leads_along_the_frontier(opened: Page) -> None:
    before = opened.locator("main").inner_text()
    opened.reload()
    assert opened.locator("main").inner_text() == before
    opened.get_by_role("link", name="Better: point 9 →").press("Enter")
    opened.wait_for_url("**/points/9")
    opened.get_by_role("link", name="← Cheaper: point 8").click()
    opened.wait_for_url("**/points/8")
    assert opened.locator("main").inner_text() == before


def test_a_point_is_accessible_fits_and_has_its_picture_taken(
    opened: Page, accessible: Callable[[], None], fits: Callable[[], None], photograph: Photograph
) -> None:
    photograph("point")
    opened.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    accessible()
    fits()


def test_a_point_of_a_thousand_layers_answers_to_the_keyboard_and_fits_a_phone(served: str, page: Page) -> None:
    answer = page.goto(f"{served}/searches/2/points/8")
    assert answer
    assert len(answer.body()) < 500_000
    cells = page.locator("table.grid td.cell")
    assert cells.count() == 1002
    cells.first.focus()
    for _ in range(60):
        page.keyboard.press("ArrowRight")
    assert page.locator(".readout").inner_text().startswith("encoder.layer.60.attention.self.query w")
    box = page.locator("td.cell:focus").bounding_box()
    assert box
    assert 0 <= box["x"] <= 1280, "the table has moved along"
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
