"""The results page in a real browser."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Engine

from db.candidates import put_candidates
from db.events import add_event
from db.queue import progress, succeed
from db.searches import set_summary
from search.metrics import METRICS
from search.request import SearchRequest
from tests.api import examples

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"NOT TESTED: the results page; there is no {CHROMIUM}"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert errors == []


def test_chart_shows_the_points_and_a_click_opens_one(served: str, page: Page, engine: Engine) -> None:
    search_id = examples.finished_search(engine)
    page.goto(f"{served}/searches/{search_id}")
    page.wait_for_selector("#chart .scatterlayer .point")
    drawn = page.evaluate("document.getElementById('chart').data.flatMap((trace) => trace.customdata)")
    assert page.locator("#chart .scatterlayer .point").count() == len(drawn)
    hrefs = page.locator("table.points tbody a").evaluate_all("(links) => links.map((link) => link.pathname)")
    searched = page.evaluate("document.getElementById('chart').data.find(({ meta }) => meta === 'searched').customdata")
    listed = set(drawn) - set(searched)
    assert {f"/searches/{search_id}/points/{number}" for number in listed} == set(hrefs), "chart and table agree"
    page.get_by_label("Size").check(force=True)
    page.wait_for_function("document.querySelector('#chart .xtitle').textContent.includes('size')")
    target = page.evaluate(
        """() => { const chart = document.getElementById('chart'), {xaxis, yaxis} = chart._fullLayout;
        const trace = chart.data.find((item) => item.meta === 'frontier'), box = chart.getBoundingClientRect();
        return { number: trace.customdata[1], x: box.left + xaxis._offset + xaxis.d2p(trace.x[1]),
                 y: box.top + yaxis._offset + yaxis.d2p(trace.y[1]) }; }"""
    )
    page.mouse.move(target["x"], target["y"])
    page.wait_for_selector("#chart .hovertext")
    page.mouse.click(target["x"], target["y"])
    page.wait_for_url(f"**/searches/{search_id}/points/{target['number']}")


def test_a_reference_line_that_waits_in_the_legend_gets_room_when_it_is_shown(
    served: str, page: Page, engine: Engine
) -> None:
    search_id, held = examples.claimed_search(engine)
    request = SearchRequest.model_validate(examples.REQUEST)
    summary, found = examples.results(engine, examples.store_model(engine), request)
    far = [loss / 1e6 for loss in summary["reference"]["rate_distortion"]]
    put_candidates(engine, held, found)
    succeed(engine, held, summary | {"reference": summary["reference"] | {"rate_distortion": far}})
    page.goto(f"{served}/searches/{search_id}")
    page.wait_for_selector("#chart .scatterlayer .point")
    name = "rate–distortion limit (ideal quantizer)"
    least = "document.getElementById('chart')._fullLayout.yaxis.range[0]"
    lines = "#chart .scatterlayer .js-line"
    assert page.evaluate(least) > -6
    before = page.locator(lines).count()
    page.locator("#chart .traces", has_text=name).locator(".legendtoggle").click()
    page.wait_for_function(f"{least} < -8")
    assert page.locator(lines).count() == before + 1
    page.locator("#chart .traces", has_text=name).locator(".legendtoggle").click()
    page.wait_for_function(f"{least} > -6")


def test_keyboard_reaches_a_point_and_its_vllm_file(served: str, page: Page, engine: Engine) -> None:
    search_id = examples.finished_search(engine)
    page.goto(f"{served}/searches/{search_id}")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('table.points tbody a') !== null"):
            break
    page.keyboard.press("Enter")
    page.wait_for_url("**/points/*")
    assert page.locator("table.grid td.cell").count() == 36
    with page.expect_download() as downloading:
        page.get_by_role("link", name="vllm").press("Enter")
    config = json.loads(Path(downloading.value.path()).read_text())
    assert config["quant_method"] == "compressed-tensors"


def test_live_page_follows_the_search_to_its_end(served: str, page: Page, engine: Engine) -> None:
    search_id, held = examples.claimed_search(engine)
    page.goto(f"{served}/searches/{search_id}")
    page.get_by_text("waiting for a worker").wait_for()
    progress(engine, held, "sensitivity", 5, 36)
    page.get_by_text("sensitivity: 5 of 36").wait_for(timeout=3000)
    assert page.locator("[aria-current=step]").inner_text() == "sensitivity"
    request = SearchRequest.model_validate(examples.REQUEST)
    _, found = examples.results(engine, examples.store_model(engine), request)
    put_candidates(engine, held, found[:4])
    work = threading.Thread(target=examples.report, args=(engine, held, request))
    work.start()
    page.get_by_text("is the best that fits").wait_for(timeout=15000)
    page.wait_for_selector("#chart .scatterlayer .point")
    work.join()


def test_heat_map_is_drawn_when_seen_and_follows_the_chosen_metric(served: str, page: Page, engine: Engine) -> None:
    search_id = examples.finished_search(engine)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))
    page.goto(f"{served}/searches/{search_id}")
    page.wait_for_selector("#chart .scatterlayer .point")
    assert "hessian_trace" not in asked, "nothing is fetched before it is seen"
    page.locator("#metric").scroll_into_view_if_needed()
    page.wait_for_selector("#sensitivity .heatmaplayer .hm")
    assert page.locator("#sensitivity .heatmaplayer .hm").count() == 1
    page.get_by_label("Heat map of").select_option("pqi")
    page.get_by_text("the loss is predicted to fall").wait_for()
    assert page.locator("#sensitivity .heatmaplayer .hm").count() == 2, "negative values have a hue of their own"
    assert page.locator("table.completeness tbody tr").count() == 4
    page.get_by_label("Heat map of").select_option("hessian_trace")
    page.get_by_text("Average Hessian trace").wait_for()
    assert asked.count("hessian_trace") == 1, "what was fetched is kept"
    page.locator("#sensitivity .heat").hover()
    page.wait_for_selector("#sensitivity .hovertext")
    assert "encoder.layer" in (page.locator("#sensitivity .hovertext").text_content() or "")


def test_live_page_says_what_a_metric_will_take_and_keeps_the_chosen_heat_map(
    served: str, page: Page, engine: Engine
) -> None:
    search_id, held = examples.claimed_search(engine)
    page.goto(f"{served}/searches/{search_id}")
    examples.enter_metric(engine, held, "pqi", 85.0, 121.0)
    page.get_by_text("sensitivity: pqi, about 2 min (85 forward passes), 0 of 36").wait_for(timeout=3000)
    progress(engine, held, "sensitivity", 5, 36)
    page.get_by_text("sensitivity: pqi, about 2 min (85 forward passes), 5 of 36").wait_for(timeout=3000)
    request = SearchRequest.model_validate(examples.REQUEST)
    summary, _ = examples.results(engine, examples.store_model(engine), request)
    set_summary(engine, held, summary)
    add_event(engine, search_id, "stage", {"stage": "baselines", "total": 4})
    page.get_by_text("baselines: 0 of 4", exact=True).wait_for(timeout=3000)
    page.get_by_label("Heat map of").select_option("kl", timeout=8000)
    page.get_by_text("Measured divergence").wait_for()
    add_event(engine, search_id, "notice", {"message": "the page is renewed"})
    page.get_by_text("the page is renewed").wait_for(timeout=8000)
    assert page.get_by_label("Heat map of").input_value() == "kl"
    assert page.locator("#sensitivity .heatmaplayer .hm").count() == 1


@pytest.mark.parametrize("width", [375, 1280])
def test_pages_fit_the_screen(served: str, page: Page, engine: Engine, width: int) -> None:
    search_id = examples.finished_search(engine, sensitivity=list(METRICS))
    page.set_viewport_size({"width": width, "height": 800})
    for path in ("/", f"/searches/{search_id}", f"/searches/{search_id}/points/9"):
        page.goto(served + path)
        if page.locator("#metric").count():
            page.locator("#metric").scroll_into_view_if_needed()
            page.wait_for_selector("#sensitivity .heatmaplayer .hm")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
