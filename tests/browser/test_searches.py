"""The list of searches in a real browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Engine

from db.queue import progress
from tests.api import examples
from tests.browser.conftest import Photograph

if TYPE_CHECKING:
    from playwright.sync_api import Page


def test_the_list_follows_what_runs_and_is_filtered(
    served: str, page: Page, engine: Engine, photograph: Photograph
) -> None:
    examples.finished_search(engine)
    examples.failed_search(engine, {"type": "x", "title": "No", "status": 422, "detail": "3 samples are too few"})
    running, held = examples.claimed_search(engine)
    examples.queued_search(engine, model="org/other")
    page.goto(served)
    assert page.locator("table.searches tbody tr").count() == 4
    progress(engine, held, "measure", 12, 64)
    page.locator(f"#search-{running}").get_by_text("Measure 12 of 64").wait_for()
    photograph("searches")
    page.get_by_label("State").select_option("succeeded")
    page.wait_for_url("**/?state=succeeded**")
    page.locator("#search-2").wait_for(state="detached")
    assert page.locator("table.searches tbody tr").count() == 1
    page.reload()
    assert page.get_by_label("State").input_value() == "succeeded"
    page.get_by_label("Model").select_option("org/other")
    page.get_by_text("No search is like this").wait_for()
    page.get_by_label("State").select_option("")
    page.locator("#search-4").wait_for()
    page.get_by_role("link", name="org/other").press("Enter")
    page.wait_for_url("**/searches/4")


def test_a_search_is_cloned_with_changes(served: str, page: Page, engine: Engine) -> None:
    search_id = examples.finished_search(engine)
    page.goto(f"{served}/searches/{search_id}")
    page.get_by_role("link", name="Clone with changes").click()
    assert page.locator('[name="budgets.avg_bits"]').input_value() == "5.25"
    assert page.locator('[name="optimizer.points"]').input_value() == "16"
    page.locator('[name="budgets.avg_bits"]').fill("6")
    page.get_by_role("button", name="Start the search").click()
    page.wait_for_url(f"**/searches/{search_id + 1}")
    page.get_by_text("≤ 6 bits per weight").wait_for()
