"""A search that runs, on its page: what its worker tells is there without a reload."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from sqlalchemy import Engine

from db.candidates import put_candidates
from db.events import tell
from db.queue import claim, progress
from search.request import SearchRequest
from tests.api import examples
from tests.browser.conftest import wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Page

DRAWN = "#chart .scatterlayer .point"


def test_a_live_page_follows_the_search_to_its_end(served: str, page: Page, engine: Engine) -> None:
    search_id = examples.queued_search(engine)
    page.goto(f"{served}/searches/{search_id}")
    page.get_by_text("Waiting for a worker").wait_for()
    assert page.locator("#state").inner_text() == "queued"
    held = claim(engine, "test-worker", examples.LEASE)
    assert held is not None
    progress(engine, held, "sensitivity", 5, 36)
    page.get_by_text("Sensitivities, 5 of 36").wait_for()
    assert page.locator("[aria-current=step]").inner_text() == "Sensitivities"
    assert page.locator("#state").inner_text() == "running"
    request = SearchRequest.model_validate(examples.REQUEST)
    _, found = examples.results(engine, examples.store_model(engine), request)
    put_candidates(engine, held, found[:4])
    tell(engine, held, "measured", {"number": 3, "label": "", "source": "uniform"}, "measured:3")
    page.wait_for_selector(DRAWN)
    page.get_by_role("link", name="uniform w8a16g64").wait_for()
    work = threading.Thread(target=examples.report, args=(engine, held, request))
    work.start()
    page.get_by_text("is the best that fits").wait_for()
    page.locator("#state", has_text="succeeded").wait_for()
    page.wait_for_selector(DRAWN)
    assert page.locator("#progress").count() == 0
    work.join(60)


def test_a_page_whose_scripts_come_slowly_follows_its_search(served: str, page: Page, engine: Engine) -> None:
    search_id = examples.queued_search(engine)
    page.route("**/hx-sse.min.js", lambda route: (time.sleep(1), route.continue_())[1])
    with page.expect_request(lambda request: f"/v1/searches/{search_id}/events" in request.url):
        page.goto(f"{served}/searches/{search_id}")


def test_points_come_in_where_the_stream_is_refused(served: str, page: Page, engine: Engine) -> None:
    search_id, held = examples.claimed_search(engine)
    page.route("**/events?after=*", lambda route: route.fulfill(status=204))
    page.clock.install()
    page.goto(f"{served}/searches/{search_id}")
    page.get_by_text("Points appear here as they are measured.").wait_for()
    request = SearchRequest.model_validate(examples.REQUEST)
    _, found = examples.results(engine, examples.store_model(engine), request)
    put_candidates(engine, held, found[:4])
    page.clock.fast_forward(13_000)
    page.wait_for_selector(DRAWN)
    page.get_by_role("link", name="uniform w8a16g64").wait_for()


def test_it_says_what_a_metric_will_take_and_what_happened(served: str, page: Page, engine: Engine) -> None:
    search_id, held = examples.claimed_search(engine)
    page.goto(f"{served}/searches/{search_id}")
    examples.enter_metric(engine, held, "pqi", 85.0, 121.0)
    page.get_by_text("Sensitivities: pqi, about 2 min (85 forward passes), 0 of 36").wait_for()
    progress(engine, held, "sensitivity", 5, 36)
    page.get_by_text("left at this pace").wait_for()
    tell(engine, held, "notice", {"message": "the pooler <is> skipped"}, "notice")
    page.locator(".journal").get_by_text("the pooler <is> skipped").wait_for()


def test_a_point_that_was_selected_stays_so_while_others_come_in(served: str, page: Page, engine: Engine) -> None:
    search_id, held = examples.claimed_search(engine)
    request = SearchRequest.model_validate(examples.REQUEST)
    _, found = examples.results(engine, examples.store_model(engine), request)
    put_candidates(engine, held, found[:6])
    page.goto(f"{served}/searches/{search_id}")
    page.wait_for_selector(DRAWN)
    page.locator("#points tr[data-point='2'] td").first.click()
    page.locator("#selected h3", has_text="Point 2").wait_for()
    put_candidates(engine, held, found)
    tell(engine, held, "measured", {"number": 9, "label": "", "source": "ilp"}, "measured:9")
    page.locator("#points tr[data-point='9']").wait_for()
    assert page.locator("#selected").get_attribute("data-point") == "2"
    assert page.locator("#points tr[aria-current]").get_attribute("data-point") == "2"
    wait_until(page, "document.getElementById('chart').data.some(({ customdata }) => customdata?.includes(9))")


def test_a_search_is_cancelled_after_a_question(served: str, page: Page, engine: Engine) -> None:
    search_id = examples.queued_search(engine)
    page.goto(f"{served}/searches/{search_id}")
    page.get_by_role("button", name="Cancel…").press("Enter")
    page.get_by_role("dialog", name="Cancel this search?").wait_for()
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog").count() == 0
    page.get_by_role("button", name="Cancel…").click()
    page.get_by_role("button", name="Cancel the search").click()
    page.locator("#state", has_text="cancelled").wait_for()
    page.locator(".journal").get_by_text("Cancelled.").wait_for()
