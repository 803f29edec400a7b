"""The page of a large search: 5 000 candidates of a model of 1 000 layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
from sqlalchemy import Engine

from tests.api import examples
from tests.browser.conftest import wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Page

LARGEST = 500_000
"""Bytes of the HTML, before it is compressed."""
SLOWEST = 5000
"""Milliseconds to the first paint where others keep the machine busy; docs/results-page.md has those of a calm one."""
PAINTED = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def test_a_large_page_is_small_and_painted_soon(served: str, page: Page, engine: Engine) -> None:
    address = f"{served}/searches/{examples.large_search(engine, layers=1000, points=5000)}"
    answer = httpx.get(address, headers={"Accept": "text/html"})
    assert len(answer.content) < LARGEST
    data = httpx.get(f"{address}/chart.json")
    again = httpx.get(f"{address}/chart.json", headers={"If-None-Match": data.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    sent = int(data.headers["content-length"])
    assert len(data.json()["points"]["number"]) == 5000
    page.goto(served)
    page.goto(address, wait_until="commit")
    wait_until(page, f"({PAINTED})() !== undefined")
    painted = page.evaluate(PAINTED)
    page.wait_for_selector("#chart .scatterlayer .point")
    print(
        f"HTML {len(answer.content)} bytes; chart {len(data.content)} bytes, {sent} sent; first paint {painted:.0f} ms"
    )
    assert painted < SLOWEST
    wait_until(page, "document.querySelectorAll('#chart .scatterlayer .point').length >= 5000")
    page.locator("#points tr[data-point]").nth(3).locator("td").first.click()
    page.locator("#points tr[aria-current]").wait_for()
    page.get_by_label("Dominated").check(force=True)
    page.get_by_role("link", name="Show 100 more").press("Enter")
    wait_until(page, "document.querySelectorAll('#points tr[data-point]').length === 200")
