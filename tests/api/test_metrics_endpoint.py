"""`/metrics`, read by Prometheus's own parser."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine, make_url

from db import tallies
from db.keys import revoke_key
from db.workers import Gpu, seen, sign_in
from tests.api import examples
from tests.api.conftest import Deaf, look_at

NOWHERE = make_url("postgresql+psycopg://nobody@/none?host=/nowhere")
GPU: Gpu = {"name": 'H100 "80\\GB"', "memory_used_bytes": 7, "memory_total_bytes": 9, "utilisation": None}


def scrape(client: TestClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(answer.text))
    samples = [sample for family in families for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples), "no series twice"
    return found


def key(name: str, /, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def test_it_tells_of_searches_results_stages_workers_and_requests(client: TestClient, engine: Engine) -> None:
    examples.finished_search(engine)
    examples.queued_search(engine)
    sign_in(engine, "host:1:ab", host="host", pid=1, version="1")
    seen(engine, "host:1:ab", 3, [GPU, GPU | {"utilisation": 0.5}])  # type: ignore[list-item]
    before = tallies.read(engine)
    with engine.begin() as connection:
        tallies.add(connection, "results_computed", "measurement", 21)
        tallies.add(connection, "results_reused", "sensitivity", 4)
        tallies.add(connection, "stage_count", "measure", 2)
        tallies.add(connection, "stage_seconds", "measure", 12.5)
    client.get("/v1/searches/1")
    client.get("/v1/searches/999")
    client.request("BREW", "/coffee/1234")
    found = scrape(client)
    assert found[key("bitfrontier_searches", state="succeeded")] == 1
    assert found[key("bitfrontier_searches", state="queued")] == 1
    assert found[key("bitfrontier_searches", state="failed")] == 0
    assert 0 < found[key("bitfrontier_oldest_queued_seconds")] < 60
    assert found[key("bitfrontier_searches_finished_total", state="succeeded")] == 1
    assert found[key("bitfrontier_attempts_failed_total")] == 0
    computed = before.get(("results_computed", "measurement"), 0) + 21
    assert found[key("bitfrontier_results_computed_total", kind="measurement")] == computed
    assert found[key("bitfrontier_results_reused_total", kind="sensitivity")] == 4
    assert found[key("bitfrontier_stage_seconds_sum", stage="measure")] == 12.5
    assert found[key("bitfrontier_stage_seconds_count", stage="measure")] == 2
    assert found[key("bitfrontier_workers")] == 1
    assert found[key("bitfrontier_evaluators", worker="host:1:ab")] == 3
    gpu = {"worker": "host:1:ab", "name": GPU["name"]}
    assert found[key("bitfrontier_gpu_memory_used_bytes", gpu="1", **gpu)] == 7
    assert found[key("bitfrontier_gpu_utilisation", gpu="1", **gpu)] == 0.5
    assert key("bitfrontier_gpu_utilisation", gpu="0", **gpu) not in found, "not known"
    assert found[key("bitfrontier_event_streams")] == 0
    assert found[key("bitfrontier_database_up")] == 1
    count = "bitfrontier_http_request_seconds_count"
    assert found[key(count, method="GET", route="/v1/searches/{search_id}", status="200")] == 1
    assert found[key(count, method="GET", route="/v1/searches/{search_id}", status="404")] == 1
    assert found[key(count, method="other", route="none", status="404")] == 1, "a client makes up no label"


def test_prometheus_may_ask_for_openmetrics(client: TestClient) -> None:
    answer = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert "bitfrontier_searches" in {family.name for family in parse_openmetrics(answer.text)}


def test_without_the_database_it_says_so(client: TestClient) -> None:
    look_at(client, NOWHERE)
    found = scrape(client)
    assert found[key("bitfrontier_database_up")] == 0
    assert key("bitfrontier_workers") not in found


def test_a_key_that_was_in_force_reads_it_while_the_database_is_away(
    keyed: TestClient, engine: Engine, bearer: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.keyring.REMEMBER_SECONDS", 0.0)
    seen, revoked, never_seen = (bearer(name, "read") for name in ("seen", "revoked", "never seen"))
    for headers in (seen, revoked):
        assert keyed.get("/metrics", headers=headers).status_code == 200
    revoke_key(engine, "revoked")
    assert keyed.get("/metrics", headers=revoked).status_code == 401
    look_at(keyed, NOWHERE)
    answer = keyed.get("/metrics", headers=seen)
    assert (answer.status_code, "bitfrontier_database_up 0.0" in answer.text) == (200, True)
    assert keyed.get("/v1/searches", headers=seen).status_code == 503, "nothing else is opened"
    for headers in (revoked, never_seen):
        assert keyed.get("/metrics", headers=headers).status_code == 503
    monkeypatch.setattr("api.keyring.SCRAPE_SECONDS", 0.0)
    assert keyed.get("/metrics", headers=seen).status_code == 503, "not for ever"


def test_a_database_that_hangs_holds_no_scrape_up(client: TestClient, deaf: Deaf) -> None:
    look_at(client, deaf.url)
    assert scrape(client)[key("bitfrontier_database_up")] == 0
