"""What a stranger wrote is shown as text: in the HTML, and in a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, text

from api.app import create_app
from db.keys import create_key
from db.models import put_model
from tests.api import examples
from tests.api.conftest import KEYS, OPEN, serving
from tests.attacks.corpus import HTML, TEXTS

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = HTML + "</script><script>document.title='hacked'</script><svg onload=\"document.title='hacked'\">{{7*7}}"
PAGES = (
    "/", "/searches/1", "/searches/1/points/1", "/searches/1/points/5", "/searches/1/sensitivities/pqi",
    "/searches/1/sensitivities/lrp", "/searches/new?from=1", "/searches/2", "/searches/3",
    "/v1/searches/1/frontier?format=html",
)  # fmt: skip
# Of the service's own data, whatever comes from a model's files, from a worker or from a request.
REPLACED = (
    "pooler.dense", "encoder.layer.3.attention.output.dense", "BertModel", "cpu (2 threads)", "no relevance rule",
    "uniform w4a16g64", "hessian_trace ≤", "python-docs", "midpoint", "all-minilm-l6-v2", "NVIDIA",
)  # fmt: skip


class Elements(HTMLParser):
    """The elements of a page that no page of ours has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.strange: list[Any] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        strange = any("hacked" in (value or "") and name.startswith("on") for name, value in attrs)
        if strange or (tag == "script" and not attrs) or (tag == "img" and ("src", "x") in attrs):
            self.strange.append((tag, attrs))


def poison(engine: Engine) -> None:
    """Put hostile HTML in the place of every text that a stranger may have chosen, wherever that is stored."""
    columns = {
        "searches": ("request", "summary", "error"), "events": ("data",), "results": ("value",),
        "candidates": ("allocation",), "models": ("inventory",),
    }  # fmt: skip
    hostile = json.dumps(HOSTILE)[1:-1]
    with engine.begin() as connection:
        for table, names in columns.items():
            for name in names:
                for old in REPLACED:
                    has = f"{name}::text LIKE '%' || :old || '%'"
                    query = f"UPDATE {table} SET {name} = replace({name}::text, :old, :new)::jsonb WHERE {has}"
                    connection.execute(text(query), {"old": json.dumps(old, ensure_ascii=False)[1:-1], "new": hostile})
        for table, name in (
            ("candidates", "label"),
            ("searches", "model"),
            ("searches", "target"),
            ("models", "source"),
        ):
            connection.execute(text(f"UPDATE {table} SET {name} = :new || {name}"), {"new": HOSTILE})


@pytest.fixture(scope="module")
def poisoned(emptied: Engine) -> Engine:
    """Three searches, finished, failed and running, whose every text is hostile."""
    examples.finished_search(emptied)
    problem = {"type": "x", "title": HOSTILE, "status": 422, "detail": HOSTILE, "field": HOSTILE, "value": HOSTILE}
    examples.failed_search(emptied, problem | {"accepted": [HOSTILE]})
    _, held = examples.claimed_search(emptied)
    examples.enter_metric(emptied, held, HOSTILE, 1, 1)
    poison(emptied)
    return emptied


@pytest.fixture(scope="module")
def client(poisoned: Engine) -> Iterator[TestClient]:
    with TestClient(create_app(poisoned, OPEN), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def keyed(poisoned: Engine) -> Iterator[TestClient]:
    with TestClient(create_app(poisoned, KEYS), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("path", PAGES)
def test_what_is_stored_is_shown_escaped(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200, answer.text[:500]
    assert "hacked" in answer.text, "it is shown"
    strange = Elements(answer.text).strange
    # A page that needs nothing else carries our two scripts.
    assert (
        not strange if "format=html" not in path else [tag for tag, attrs in strange if attrs or tag != "script"] == []
    )
    assert "{{7*7}}" in answer.text
    assert "script-src 'self'" in answer.headers["content-security-policy"] or path.startswith("/v1")


@pytest.mark.parametrize(
    "hostile", [HTML, *(words for words in TEXTS.values() if len(words) < 300 and words.isprintable())]
)
def test_what_a_request_may_hold_is_shown_escaped(client: TestClient, poisoned: Engine, hostile: str) -> None:
    put_model(poisoned, "unseen", "somewhere", None)
    body = {
        "model": "unseen", "space": {"ignore": [hostile], "pin": {hostile: "w8a16g64"}},
        "budgets": {"avg_bits": 5, "limits": {hostile: {"avg_bits": 5}}},
    }  # fmt: skip
    posted = client.post("/v1/searches", json=body)
    assert posted.status_code == 202, posted.text
    assert posted.json()["request"]["space"]["ignore"] == [hostile], "kept as it is"
    for page in (client.get(f"/searches/{posted.json()['id']}"), client.get("/")):
        assert page.status_code == 200
        assert not Elements(page.text).strange


@pytest.mark.parametrize(
    "path", ["/x{}", "/searches/{}", "/?cursor={}", "/searches/1/points/{}", "/login?next={}", "/login?next=/{}"]
)
def test_what_was_asked_for_is_shown_escaped(client: TestClient, keyed: TestClient, path: str) -> None:
    for asked in (client, keyed):
        for site in ({}, {"Sec-Fetch-Site": "cross-site"}):
            answer = asked.get(path.format(HOSTILE), headers={"Accept": "text/html"} | site)
            assert answer.headers["content-type"].startswith("text/html")
            assert not Elements(answer.text).strange


def test_name_of_a_key_is_shown_escaped(poisoned: Engine, keyed: TestClient) -> None:
    _, token = create_key(poisoned, HTML[:100], {"admin"})
    page = keyed.get("/", headers={"Authorization": f"Bearer {token}", "Accept": "text/html"})
    assert "&lt;script&gt;" in page.text
    assert not Elements(page.text).strange


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"NOT TESTED: pages in a browser; there is no {CHROMIUM}")
def test_no_script_of_a_stranger_runs_in_a_browser(poisoned: Engine, browser: Browser) -> None:
    """Nor does any reach the browser as a script: it would say that its policy forbids it."""
    with serving(create_app(poisoned, OPEN)) as url:
        for path in (page for page in PAGES if "format" not in page and "sensitivities" not in page):
            page = browser.new_page()
            said: list[str] = []
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on(
                "console", lambda message, said=said: said.append(message.text) if message.type == "error" else None
            )
            page.on("dialog", lambda dialog, said=said: said.append(dialog.message))
            page.goto(url + path)
            if path == "/searches/1":
                page.wait_for_selector("#chart .scatterlayer .point")
                page.locator("#chart .scatterlayer .point").first.hover(force=True)
            assert page.title() != "hacked"
            assert page.evaluate("document.querySelectorAll('img[src=x], [onerror], [onload]').length") == 0
            assert said == [], path
            page.close()
