"""Every page, in the light and in the dark, on a desk and on a phone: for axe-core, and without a bar to scroll by."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Engine

from db.queue import progress
from search.metrics import METRICS
from tests.api import examples

if TYPE_CHECKING:
    from playwright.sync_api import Page

DRAWN = "#chart .scatterlayer .point"
PAGES = {
    "/": None,
    "/searches/new": None,
    "/searches/1": DRAWN,
    "/searches/1?show=rejected&show=searched&sort=loss&order=desc&point=22": DRAWN,
    "/searches/2": None,
    "/searches/3": None,
    "/searches/1/points/9": None,
    "/searches/1/sensitivities": None,
    "/compare?searches=1": None,
    "/login": None,
    "/nowhere": None,
}
"""Path → what to wait for."""


@pytest.fixture
def searches(engine: Engine) -> None:
    """One that has ended, one that failed, one at work."""
    examples.finished_search(engine, sensitivity=list(METRICS))
    examples.failed_search(engine, {"type": "x", "title": "No", "status": 422, "detail": "too few", "field": "x"})
    _, held = examples.claimed_search(engine)
    progress(engine, held, "sensitivity", 5, 36)


@pytest.mark.usefixtures("searches")
def test_axe_finds_no_violation_and_nothing_is_too_wide(
    served: str, page: Page, accessible: Callable[[], None], fits: Callable[[], None]
) -> None:
    for path, drawn in PAGES.items():
        page.goto(served + path)
        if drawn:
            page.wait_for_selector(drawn)
        for details in page.locator("details").all():
            details.evaluate("(one) => { one.open = true; }")
        accessible()
        fits()
