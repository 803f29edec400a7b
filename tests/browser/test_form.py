"""A search from the form to its end: with a real worker, on a tiny model."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Engine

from db.models import put_model
from tests import models
from tests.api import examples
from tests.browser.conftest import Photograph
from workers.worker import Worker

if TYPE_CHECKING:
    from playwright.sync_api import Page

LONG = 120_000
"""Milliseconds that the search may take on a slow machine."""


@pytest.fixture
def worker(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker that is at work in a thread, and a model "tiny" that it can load."""
    monkeypatch.setenv("BITFRONTIER_POOL", "inprocess")
    monkeypatch.setenv("BITFRONTIER_DATA", str(tmp_path))
    (tmp_path / "tiny").mkdir()
    put_model(engine, "tiny", str(models.tiny_llama(tmp_path / "tiny")), None)
    worker = Worker(engine)
    thread = threading.Thread(target=worker.run)
    thread.start()
    yield
    worker.stop()
    thread.join(60)
    assert not thread.is_alive()


def fill(page: Page, **texts: str) -> None:
    for name, text in texts.items():
        page.locator(f'[name="{name.replace("__", ".")}"]').fill(text)


@pytest.mark.usefixtures("worker")
def test_a_search_is_started_from_the_form_and_watched_to_its_end(served: str, page: Page) -> None:
    page.goto(served)
    page.get_by_role("link", name="New search").first.click()
    assert page.get_by_role("combobox", name="Model").input_value() == "tiny", "a model that is there"
    page.get_by_text("Ranges are known once a worker has inspected the model").wait_for()
    page.get_by_text("Advanced settings", exact=True).click()
    fill(page, budgets__avg_bits="6", space__schemes="w4a16 w8a16", calibration__samples="8")
    fill(page, calibration__sequence_length="16", optimizer__points="3", optimizer__evaluations="6")
    page.locator("#command-1", has_text="--schemes w4a16,w8a16").wait_for()
    page.get_by_role("button", name="Start the search").click()
    page.wait_for_url("**/searches/1")
    page.get_by_text("is the best that fits").wait_for(timeout=LONG)
    page.locator("#state", has_text="succeeded").wait_for(timeout=LONG)
    page.wait_for_selector("#chart .scatterlayer .point")
    for words in ("Finished.", "Accept took", "A worker took it up."):
        page.locator(".journal").get_by_text(words).first.wait_for(state="attached")
    assert page.locator(".stages .stage-done").count() == 7
    page.goto(f"{served}/searches/new?from=1")
    page.locator("#range-avg_bits", has_text="to").wait_for()


def test_ranges_and_commands_follow_the_form(served: str, page: Page, engine: Engine) -> None:
    examples.store_model(engine)
    page.goto(f"{served}/searches/new")
    page.locator("#range-size_mb strong", has_text="12.4").first.wait_for()
    page.get_by_role("combobox", name="Target").select_option("vllm")
    page.locator("#range-size_mb strong", has_text="29.8").first.wait_for()
    fill(page, budgets__size_mb="33.5")
    command = page.locator("#command-1")
    page.locator("#command-1", has_text="--budget size_mb=33.5").wait_for()
    page.get_by_role("button", name="Copy Command line").click()
    page.get_by_role("status").get_by_text("Copied").wait_for(state="attached")
    assert page.evaluate("navigator.clipboard.readText()") == command.inner_text()
    fill(page, model="nobody-knows-it")
    page.get_by_text("is not a registered model").wait_for()
    page.get_by_role("button", name=examples.MODEL).click()
    page.locator("#range-size_mb strong", has_text="29.8").first.wait_for()


def test_the_curl_line_starts_the_search_that_the_form_would(served: str, page: Page, engine: Engine) -> None:
    search_id = examples.finished_search(engine)
    page.goto(f"{served}/searches/new?from={search_id}")
    line = page.locator("#command-2").inner_text()
    done = subprocess.run(["bash", "-c", line + " -s"], capture_output=True, text=True, timeout=60)
    assert '"id":2' in done.stdout.replace(" ", ""), done
    page.get_by_role("button", name="Start the search").click()
    page.wait_for_url("**/searches/3")
    first, second = (page.request.get(f"{served}/v1/searches/{number}").json()["request"] for number in (2, 3))
    assert first == second == page.request.get(f"{served}/v1/searches/1").json()["request"]


def test_what_is_wrong_stands_beside_its_field_and_nothing_is_lost(
    served: str, page: Page, engine: Engine, photograph: Photograph
) -> None:
    examples.store_model(engine)
    page.goto(f"{served}/searches/new")
    page.get_by_text("Advanced settings", exact=True).click()
    fill(page, budgets__avg_bits="three", space__pin="*.query = w8a16g64", optimizer__points="0")
    page.get_by_role("button", name="Start the search").click()
    page.get_by_role("alert").get_by_role("link", name="budgets.avg_bits should be a valid number").click()
    assert page.evaluate("document.activeElement.name") == "budgets.avg_bits"
    wrong = page.locator('[aria-invalid="true"]')
    assert wrong.evaluate_all("(all) => all.map((one) => one.name)") == ["budgets.avg_bits", "optimizer.points"]
    assert page.locator('[name="space.pin"]').input_value() == "*.query = w8a16g64"
    photograph("new-errors")
    fill(page, budgets__avg_bits="3", optimizer__points="20")
    page.get_by_role("button", name="Start the search").click()
    page.locator(".error", has_text="the smallest feasible value is").wait_for()
    fill(page, budgets__avg_bits="6")
    page.get_by_role("button", name="Start the search").press("Enter")
    page.wait_for_url("**/searches/1")
