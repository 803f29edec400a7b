"""Searches beside each other in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Engine

from api.app import create_app
from tests.api import examples
from tests.api.conftest import OPEN, serving
from tests.browser.conftest import Photograph

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def served(own_engine: Engine) -> Iterator[str]:
    """The URL of a server with three searches, the third of another model."""
    examples.finished_search(own_engine)
    examples.finished_search(own_engine, space=examples.ACTIVATIONS)
    examples.deep_search(own_engine, 7, model="a-deeper-one")
    with serving(create_app(own_engine, OPEN)) as url:
        yield url


@pytest.fixture
def opened(served: str, page: Page) -> Page:
    page.goto(f"{served}/compare?searches=1,2,3")
    page.wait_for_selector("#comparison .scatterlayer .point")
    return page


def test_a_click_opens_the_point_of_its_search(opened: Page) -> None:
    assert opened.locator("#comparison .traces").count() == 6, "a line and the uniform baselines of each"
    target = opened.evaluate(
        """() => { const chart = document.getElementById('comparison'), {xaxis, yaxis} = chart._fullLayout;
        const trace = chart.data.find(({ meta }) => meta === 2), box = chart.getBoundingClientRect();
        return { path: trace.customdata.at(-1), x: box.left + xaxis._offset + xaxis.d2p(trace.x.at(-1)),
                 y: box.top + yaxis._offset + yaxis.d2p(trace.y.at(-1)) }; }"""
    )
    opened.mouse.move(target["x"], target["y"])
    opened.wait_for_selector("#comparison .hovertext")
    opened.mouse.click(target["x"], target["y"])
    opened.wait_for_url(f"**{target['path']}")
    assert target["path"].startswith("/searches/3/points/")


def test_the_axis_is_chosen_by_keyboard_and_stays_in_the_address(opened: Page) -> None:
    opened.get_by_role("link", name="Size", exact=True).press("Enter")
    opened.wait_for_url("**/compare?searches=1,2,3&axis=size_bytes")
    opened.wait_for_selector("#comparison .scatterlayer .point")
    assert opened.locator("#comparison .xtitle").text_content() == "Model size, MB"
    opened.reload()
    assert opened.locator(".pills [aria-current]").inner_text() == "Size"


def test_searches_are_chosen_without_a_script(served: str, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{served}/compare")
    for number in ("1", "2"):
        page.locator(f"input[value='{number}']").check()
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("heading", name="Side by side").wait_for()
    assert page.locator("table.compared tbody tr").count() == 2
    context.close()


def test_a_comparison_is_accessible_fits_and_has_its_picture_taken(
    opened: Page, accessible: Callable[[], None], fits: Callable[[], None], photograph: Photograph
) -> None:
    assert "different models" in opened.locator(".notice").inner_text()
    accessible()
    fits()
    photograph("compare")
