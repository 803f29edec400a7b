"""Nobody keeps the service busy with requests that are long to look into."""

from __future__ import annotations

from threading import Event
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, text

from api import admission
from api.admission import ADMISSIONS
from api.app import create_app
from db.models import put_model
from search.inventory import Inventory, Layer
from tests.api import examples
from tests.api.conftest import OPEN
from tests.aside import PATIENCE, aside, results, wait_until

WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%FROM models%'"


def test_only_so_many_requests_are_looked_into_at_once_and_given_up_ones_count(engine: Engine) -> None:
    examples.store_model(engine)
    app = create_app(engine, OPEN.model_copy(update={"answer_seconds": 1.5}))
    with TestClient(app, raise_server_exceptions=False) as client:

        def post() -> int:
            return client.post("/v1/searches", json=examples.REQUEST).status_code

        with engine.begin() as connection:
            connection.execute(text("LOCK TABLE models IN ACCESS EXCLUSIVE MODE"))
            assert results([aside(post) for _ in range(6)]) == [503] * 6
            wait_until(lambda: waiting(engine) == ADMISSIONS, "they work on, the others never begin")
            assert client.get("/v1/searches").status_code == 200
        wait_until(lambda: post() == 202, "the others are done with")


def test_whoever_asks_for_ranges_keeps_no_search_waiting(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    examples.store_model(engine)
    begun, go_on = Event(), Event()

    def slow(*about: Any) -> None:
        begun.set()
        assert go_on.wait(PATIENCE)

    monkeypatch.setattr(admission, "feasible_ranges", slow)
    body = {name: examples.REQUEST[name] for name in ("model", "target", "space")}
    with TestClient(create_app(engine, OPEN), raise_server_exceptions=False) as client:
        asked = [aside(lambda: client.post("/v1/ranges", json=body).status_code) for _ in range(2 * ADMISSIONS)]
        try:
            assert begun.wait(PATIENCE)
            assert client.post("/v1/searches", json=examples.REQUEST).status_code == 202
        finally:
            go_on.set()
        assert results(asked) == [200] * len(asked)


def test_ranges_of_a_fine_space_are_not_worked_out(engine: Engine) -> None:
    layer = Layer("model.layers.0.up_proj", "linear", 10_001, 64, 1, "model.layers.0")
    put_model(engine, "wide", "somewhere", Inventory("d", "X", "causal-lm", 0, (layer,)))
    space = {"granularity": "channels", "channels": 1, "schemes": ["w4a16g64", "w8a16g64"]}
    body = {"model": "wide", "target": "generic", "space": space}
    form = {"model": "wide", "target": "generic", "space.granularity": "channels", "space.channels": "1",
            "space.schemes": "w4a16g64 w8a16g64"}  # fmt: skip
    with TestClient(create_app(engine, OPEN), raise_server_exceptions=False) as client:
        answer = client.post("/v1/ranges", json=body)
        told = client.post("/searches/new/preview", data=form).text
        coarser = client.post("/v1/ranges", json=body | {"space": space | {"channels": 2}})
        searched = client.post("/v1/searches", json=body | {"budgets": {"avg_bits": 9}})
    assert (answer.status_code, answer.json()["field"], answer.json()["value"]) == (422, "space.channels", 1)
    assert "20,002 entries" in answer.json()["detail"]
    assert "ranges are not worked out for so fine a space" in told
    assert (coarser.status_code, searched.status_code) == (200, 202), "a search takes it"


def waiting(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(text(WAITING)).scalar_one())


def test_a_space_of_millions_is_refused_at_once(engine: Engine) -> None:
    layer = Layer("model.layers.0.up_proj", "linear", 10_000_000, 64, 1, "model.layers.0")
    put_model(engine, "wide", "somewhere", Inventory("d", "X", "causal-lm", 0, (layer,)))
    space = {"granularity": "channels", "channels": 1, "schemes": ["w4a16g64", "w8a16g64"]}
    body = {"model": "wide", "target": "generic", "space": space, "budgets": {"avg_bits": 5}}
    with TestClient(create_app(engine, OPEN), raise_server_exceptions=False) as client:
        answer = client.post("/v1/searches", json=body)
    assert (answer.status_code, answer.json()["field"], answer.json()["value"]) == (422, "space.channels", 1)
    assert "20,000,000 entries" in answer.json()["detail"]
