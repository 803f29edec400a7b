"""The sensitivities of a search in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
from sqlalchemy import Engine

from api.app import create_app
from search.metrics import METRICS
from tests.api import examples
from tests.api.conftest import OPEN, serving
from tests.browser.conftest import Photograph

if TYPE_CHECKING:
    from playwright.sync_api import Page

PATH = "/searches/1/sensitivities"


@pytest.fixture(scope="module")
def served(own_engine: Engine) -> Iterator[str]:
    """The URL of a server with a search by every metric."""
    examples.finished_search(own_engine, sensitivity=list(METRICS))
    with serving(create_app(own_engine, OPEN)) as url:
        yield url


@pytest.fixture
def opened(served: str, page: Page) -> Page:
    page.goto(served + PATH)
    page.wait_for_selector("#sensitivities .heatmaplayer .hm")
    return page


def test_the_heat_map_follows_the_chosen_metric(opened: Page) -> None:
    assert opened.locator("#sensitivities .heatmaplayer .hm").count() == 1
    opened.get_by_role("link", name="pqi", exact=True).click()
    opened.get_by_text("the loss is predicted to fall").wait_for()
    assert opened.locator("#sensitivities .heatmaplayer .hm").count() == 2, "negative values have a hue of their own"
    assert opened.locator("table.completeness tbody tr").count() == 4
    opened.locator("#sensitivities .heat").hover()
    opened.wait_for_selector("#sensitivities .hovertext")
    assert "encoder.layer" in (opened.locator("#sensitivities .hovertext").text_content() or "")


def test_the_table_is_sorted_by_keyboard(opened: Page) -> None:
    opened.get_by_role("link", name="w8a16g64", exact=True).press("Enter")
    opened.wait_for_url("**sort=w8a16g64#table")
    assert opened.locator("[aria-sort=descending]").inner_text().startswith("w8a16g64")
    last = opened.locator("table.sortable td:last-child .bar > span").evaluate_all(
        "(bars) => bars.map((bar) => parseFloat(bar.style.width))"
    )
    assert last == sorted(last, reverse=True)
    assert last[0] == 100


def test_parquet_is_downloaded_and_read_back(opened: Page, tmp_path: Path) -> None:
    with opened.expect_download() as downloading:
        opened.get_by_role("link", name="Parquet").click()
    assert downloading.value.suggested_filename == "search-1-sensitivities.parquet"
    downloading.value.save_as(tmp_path / "table.parquet")
    table = pd.read_parquet(tmp_path / "table.parquet")
    assert list(table.metric.unique()) == list(METRICS)
    assert len(table) == len(METRICS) * 24 * 4


def test_sensitivities_are_accessible_fit_and_have_their_picture_taken(
    opened: Page, accessible: Callable[[], None], fits: Callable[[], None], photograph: Photograph
) -> None:
    accessible()
    fits()
    photograph("sensitivities")
