"""The pages in Debian's Chromium. What a page logs as an error, what its policy forbids among it, fails its test."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from axe_playwright_python.sync_playwright import Axe

from tests.api.conftest import keyed_served, served  # noqa: F401 - pytest looks for them here

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

CHROMIUM = Path("/usr/bin/chromium")
ARTEFACTS = Path(os.environ.get("BITFRONTIER_TEST_ARTEFACTS", Path(__file__).parents[2] / "test-artefacts"))
"""Where screenshots go."""

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 375, "height": 800}
PATIENCE = 30_000
"""Milliseconds that a test waits for what a page is to show."""

Photograph = Callable[[str], None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"NOT TESTED: the results page; there is no {CHROMIUM}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A name of this machine that browsers do not trust like localhost.
        names = "--host-resolver-rules=MAP bits.test 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", names])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page in a context of its own, 1280 × 900, light."""
    context = browser.new_context(viewport=DESKTOP, permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if _is_error(message) else None)
    yield page
    context.close()
    assert errors == [], "among them what the content security policy forbids"


def _is_error(message: ConsoleMessage) -> bool:
    """Whether a page logged an error; that it is itself the answer to a wrong request is none of its own."""
    page = message.page
    refused = message.text.startswith("Failed to load resource") and page and message.location["url"] == page.url
    return message.type == "error" and not refused


@pytest.fixture
def photograph(page: Page) -> Photograph:
    """Writes what the page shows to the artefacts: light, dark, and as wide as a phone. `photograph("search")`."""

    def shoot(name: str) -> None:
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        for kind, scheme, size in (("light", "light", DESKTOP), ("dark", "dark", DESKTOP), ("phone", "light", PHONE)):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size(size)
            settle(page)
            page.screenshot(path=ARTEFACTS / f"{name}-{kind}.png", full_page=True)
        page.emulate_media(color_scheme="light")
        page.set_viewport_size(DESKTOP)

    return shoot


@pytest.fixture
def accessible(page: Page) -> Callable[[], None]:
    """Asserts that axe-core finds nothing wrong with what the page shows, in the light and in the dark."""

    def check() -> None:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            settle(page)
            found = Axe().run(page).response["violations"]
            told = [(rule["id"], rule["help"], [node["html"][:200] for node in rule["nodes"][:4]]) for rule in found]
            assert told == [], f"{page.url}, {scheme}"
        page.emulate_media(color_scheme="light")

    return check


@pytest.fixture
def fits(page: Page) -> Callable[[], None]:
    """Asserts that nothing is wider than the screen, on a phone and on a desk."""

    def check() -> None:
        for size in (PHONE, DESKTOP):
            page.set_viewport_size(size)
            settle(page)
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= size["width"], page.url

    return check


def wait_until(page: Page, expression: str) -> None:
    """Wait for an expression to hold. The pages' security policy forbids Playwright's own way, which evaluates text."""
    deadline = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def settle(page: Page) -> None:
    """Wait until what a new size or theme changed is drawn, and no transition is left."""
    page.evaluate(
        "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => "
        "Promise.allSettled(document.getAnimations().map((one) => one.finished)).then(done))))"
    )
