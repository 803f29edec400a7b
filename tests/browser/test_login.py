"""Keys in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sqlalchemy import Engine

from db.keys import create_key
from db.searches import create_search
from search.request import SearchRequest
from tests.api import examples

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Route


def other_site(address: str) -> Callable[[Route], None]:
    body = f'<a id="link" href="{address}/searches/1">x</a>'
    body += f'<form method="post" action="{address}/searches/1/cancel"><button id="form">y</button></form>'
    return lambda route: route.fulfill(body=body, content_type="text/html")


def test_logging_in_cancelling_and_logging_out_need_no_script(
    keyed_served: str, served: str, browser: Browser, engine: Engine
) -> None:
    key, token = create_key(engine, "ada", {"write"})
    create_search(engine, SearchRequest.model_validate(examples.REQUEST), key=key)
    # On a name that is not loopback, browsers say less of where a form comes from.
    for host in ("localhost", "bits.test"):
        address = keyed_served.replace("127.0.0.1", host)
        context = browser.new_context(java_script_enabled=False)
        page = context.new_page()
        page.goto(f"{address}/searches/1")
        page.get_by_label("Key").fill("bf_wrong")
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("alert").get_by_text("the key is not known").wait_for()
        page.get_by_label("Key").fill(token)
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url(f"{address}/searches/1")
        assert page.locator(".who").inner_text().split()[0] == "ada"
        # Another site's link is followed, and its form is not.
        other = context.new_page()
        other.route("**/other", other_site(address))
        other.goto(f"{served}/other")
        other.locator("#link").click()
        if host == "bits.test":
            other.get_by_role("link", name="Go on").click()
        other.locator(".who").wait_for()
        other.goto(f"{served}/other")
        other.locator("#form").click()
        other.get_by_text("comes from a page of another site").wait_for()
        page.goto(f"{address}/searches/1")
        if host == "bits.test":
            page.get_by_role("button", name="Cancel…").click()
            page.get_by_role("button", name="Cancel the search").click()
            page.wait_for_url(f"{address}/searches/1")
            assert page.locator(".facts .state").inner_text() == "cancelled"
        page.get_by_role("button", name="Log out").click()
        page.wait_for_url(f"{address}/login")
        page.goto(f"{address}/searches/1")
        page.wait_for_url(f"{address}/login?next=%2Fsearches%2F1")
        context.close()
