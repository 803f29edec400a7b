"""The Python client against a real server."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from sqlalchemy import Engine

from api.client import (
    Client,
    ClientError,
    MeasuredEvent,
    NotFinished,
    NoticeEvent,
    ProgressEvent,
    Refused,
    SearchCancelled,
    SearchFailed,
    StageEvent,
    StateEvent,
    Unreachable,
)
from api.client_errors import NotAKey, NotAnAddress
from api.commands.service import free_port
from db.events import events_after
from db.keys import create_key, revoke_key
from db.queue import cancel
from db.searches import list_searches
from search.request import SearchRequest
from tests.api import examples
from tests.api.relay import relay
from tests.api.terminal import a_worker, finish
from tests.aside import PATIENCE, aside

DOCS = Path(__file__).parents[2] / "docs" / "client.md"


@pytest.fixture
def client(served: str) -> Iterator[Client]:
    with Client(served) as client:
        yield client


def test_the_example_of_the_documentation_runs_and_ends_in_a_table(
    served: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examples.store_model(engine)
    monkeypatch.setenv("BITFRONTIER_URL", served)
    monkeypatch.delenv("BITFRONTIER_KEY", raising=False)
    main, errors = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    found: dict[str, Any] = {}
    with a_worker(engine, finish):
        exec(main, found)
    table = found["table"]
    assert isinstance(table, pd.DataFrame)
    assert table["loss"].is_monotonic_decreasing, "more bits, less loss"
    assert (table["avg_bits"] <= 5.25).all()
    assert found["best"] in table.index
    assert json.loads(found["config"].text)["quant_method"] == "compressed-tensors"
    assert len(found["fragile"]) == 24
    assert "w4a16g64" in capsys.readouterr().out
    exec(errors, found)
    assert found["smallest"] == 4.25


def test_every_public_method_is_documented() -> None:
    table = DOCS.read_text()
    names = {name for name in vars(Client) if not name.startswith("_")} - {"url"}
    assert {name for name in names if f"`{name}(" not in table and f"`{name}()`" not in table} == set()
    assert all(getattr(Client, name).__doc__ for name in names)


def test_events_are_typed_and_end_with_the_search(client: Client, engine: Engine) -> None:
    search_id = examples.finished_search(engine)
    events = list(client.events(search_id))
    assert [event.id for event in events] == [event.id for event in events_after(engine, search_id, 0, limit=1000)]
    kinds = {type(event) for event in events}
    assert kinds == {StateEvent, StageEvent, ProgressEvent, MeasuredEvent, NoticeEvent}
    first, last = events[0], events[-1]
    assert isinstance(first, StateEvent)
    assert first.state == "queued"
    assert isinstance(last, StateEvent)
    assert last.state == "succeeded"
    measured = next(event for event in events if isinstance(event, MeasuredEvent))
    assert measured.costs["avg_bits"] == 4.25
    assert [event.id for event in client.events(search_id, after=events[5].id)] == [event.id for event in events[6:]]


def test_events_of_a_broken_connection_are_missed_by_nobody(served: str, engine: Engine) -> None:
    search_id, held = examples.claimed_search(engine)
    with relay(served, b"GET /v1/searches/1/events", most=1500, breaks=2) as broken, Client(broken.url) as client:
        working = aside(finish, engine, held)
        told = [event.id for event in client.events(search_id, timeout=PATIENCE)]
        working.result(PATIENCE)
        assert broken.broken == 2
    assert told == [event.id for event in events_after(engine, search_id, 0, limit=1000)]


def test_a_lost_answer_starts_no_second_search(served: str, engine: Engine) -> None:
    examples.store_model(engine)
    with relay(served, b"POST /v1/searches", most=0) as broken, Client(broken.url) as client:
        created = client.create(examples.REQUEST)
        assert broken.broken == 1
    assert [search.id for search in list_searches(engine, limit=10)] == [created.id]


def test_what_never_answers_is_said(served: str) -> None:
    with relay(served, b"GET /v1/models", most=0, breaks=9) as broken, Client(broken.url, retries=2) as client:
        with pytest.raises(Unreachable, match=f"no answer from {broken.url}"):
            client.models()
        assert broken.broken == 3, "once, and twice again"


def test_a_request_is_a_document_or_a_dictionary(client: Client, engine: Engine) -> None:
    examples.store_model(engine)
    request = SearchRequest.model_validate(examples.REQUEST)
    first, second = client.create(request, idempotency_key="a"), client.create(examples.REQUEST, idempotency_key="a")
    assert first.id == second.id
    assert SearchRequest.model_validate(first.request) == request
    assert client.create(request).id != first.id
    assert client.search(first.id).state == "queued"
    assert client.cancel(first.id).state == client.cancel(first.id).state == "cancelled"


def test_searches_come_page_by_page(client: Client, engine: Engine) -> None:
    numbers = [examples.queued_search(engine) for _ in range(5)]
    other = examples.queued_search(engine, model="org/other")
    cancel(engine, numbers[0])
    assert [one.id for one in client.searches(page_size=2)] == [other, *reversed(numbers)]
    assert [one.id for one in client.searches(state="cancelled")] == [numbers[0]]
    assert [one.id for one in client.searches(model="org/other", page_size=1)] == [other]


def test_waiting_ends_as_the_search_does(client: Client, engine: Engine) -> None:
    assert client.wait(examples.finished_search(engine), timeout=PATIENCE).state == "succeeded"
    problem = {"type": "x", "title": "Too little data", "status": 422, "detail": "3 of 64", "field": "calibration"}
    failed = examples.failed_search(engine, problem)
    with pytest.raises(SearchFailed, match="3 of 64") as told:
        client.wait(failed)
    assert (told.value.problem.field, told.value.search.id) == ("calibration", failed)
    queued = examples.queued_search(engine)
    with pytest.raises(NotFinished) as late:
        client.wait(queued, timeout=0.2)
    assert isinstance(late.value, TimeoutError)
    with pytest.raises(NotFinished, match="queued"):
        client.result(queued)
    cancel(engine, queued)
    with pytest.raises(SearchCancelled):
        client.wait(queued)


def test_refusals_carry_the_problem(client: Client, engine: Engine) -> None:
    examples.store_model(engine)
    with pytest.raises(Refused) as told:
        client.create({"model": examples.MODEL, "budgets": {"avg_bits": 3}})
    problem = told.value.problem
    assert (problem.status, problem.field, problem.value) == (422, "budgets.avg_bits", 3)
    assert problem.accepted == {"minimum": 4.25}
    assert problem.request_id
    with pytest.raises(ClientError, match="no search 99"):
        client.search(99)
    with pytest.raises(Refused, match="no search 99"):
        next(client.events(99))


def test_results_are_documents_and_tables(client: Client, engine: Engine, tmp_path: Path) -> None:
    search_id = examples.finished_search(engine)
    frontier = client.frontier(search_id, include=("baselines", "dominated", "predicted"), under={"avg_bits": 4.6})
    assert {frontier.best, frontier.best_under} < {point.number for point in frontier.points}
    assert client.frontier(search_id, include=()).baselines is None
    table = client.frontier_table(search_id, include=("dominated",))
    groups = [*frontier.points, *(frontier.dominated or [])]
    assert dict(table["loss"].dropna()) == {one.number: one.metrics["loss"] for one in groups if "loss" in one.metrics}
    assert table["avg_bits"].max() <= max(point.costs["avg_bits"] for point in groups)
    sensitivities = client.sensitivities(search_id)
    tables = json.loads(client.sensitivities_file(search_id, "json").content)["tables"]
    assert set(sensitivities["metric"]) == set(tables)
    kl = sensitivities[sensitivities["metric"] == "kl"].pivot(index="unit", columns="scheme", values="sensitivity")
    expected = pd.DataFrame(tables["kl"]["values"], tables["kl"]["units"], tables["kl"]["schemes"])
    assert_frame_equal(kl.loc[expected.index, expected.columns], expected, check_names=False, check_exact=True)
    point = client.point(search_id, 9)
    assert point.allocation
    assert point == next(one for one in frontier.points if one.number == 9).model_copy(
        update={"allocation": point.allocation}
    )
    file = client.export(search_id, 9, "vllm")
    assert file.save(tmp_path) == tmp_path / file.name
    assert file.save(tmp_path / "deep" / "config.json").read_bytes() == file.content
    assert client.frontier_file(search_id, "html").text.startswith("<!doctype html>")


def test_what_a_search_may_name(client: Client, engine: Engine) -> None:
    assert client.models() == []
    examples.store_model(engine)
    assert [model.name for model in client.models()] == [examples.MODEL]
    assert {target.name for target in client.targets().targets} >= {"generic", "vllm"}
    assert all(export.carries and export.use for export in client.targets().exports)
    assert "w4a16g64" in {example.scheme for example in client.schemes().examples}
    assert {metric.name for metric in client.metrics().metrics} >= {"fisher", "kl"}
    assert client.latency_profiles() == []


def test_a_key_is_sent_and_named_where_it_opens_nothing(keyed_served: str, engine: Engine) -> None:
    token = create_key(engine, "ci", {"read"})[1]
    with Client(keyed_served, key=token) as client:
        assert client.models() == []
        with pytest.raises(Refused, match="scope write"):
            client.cancel(1)
    revoke_key(engine, "ci")
    with Client(keyed_served, key="bf_wrong") as client, pytest.raises(Refused, match="is not known here") as told:
        client.models()
    assert told.value.problem.status == 401
    with pytest.raises(NotAKey):
        Client(keyed_served, key="bf_\N{SNOWMAN}")


def test_what_is_no_service_is_said() -> None:
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/v1/models" else 404)
            self.end_headers()
            self.wfile.write(b"<h1>hello</h1>")

        def log_message(self, *_: Any) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{server.server_port}") as client:
            for ask in (client.models, client.schemes):
                with pytest.raises(Unreachable, match="is this a Bitfrontier service"):
                    ask()
        server.shutdown()
    with Client(f"http://127.0.0.1:{free_port()}", retries=0) as client, pytest.raises(Unreachable):
        client.models()
    with pytest.raises(NotAnAddress, match="'here'"):
        Client("here")


def test_importing_the_client_is_lean() -> None:
    heavy = ["fastapi", "sqlalchemy", "pandas", "numpy", "plotly", "jinja2", "torch", "ray", "typer"]
    script = f"import sys, api.client; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.strip() == "[]"
