"""Latency profiles over HTTP, on the command line and on the page; and searches that are refused by them at once."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from api.resources import latency_text
from db.latency import list_profiles, put_profile
from search.latency_profile import MOST_BYTES, LatencyProfile, read_profile, write_profile
from tests.api import examples
from tests.api.terminal import run
from tests.search.profiles import DEVICE, profile_of

SCHEMES = ["w4a16g64", "w8a16g64"]
PROFILE = profile_of(examples.encoder(), SCHEMES, (1, 16))


@pytest.fixture
def stored(engine: Engine) -> LatencyProfile:
    examples.store_model(engine)
    return put_profile(engine, PROFILE)


def asked(**changes: Any) -> dict[str, Any]:
    request = {"model": examples.MODEL, "space": {"schemes": SCHEMES}, "budgets": {"latency_ms": 50}}
    return request | {"latency": {"profile": DEVICE, "tokens": 16}} | changes


def test_profiles_are_listed_and_handed_out_as_files(client: TestClient, stored: LatencyProfile) -> None:
    (listed,) = client.get("/v1/latency-profiles").json()["profiles"]
    assert (listed["device"], listed["key"], listed["tokens"]) == (DEVICE, stored.key, [1, 16])
    assert listed["products"] == len(stored.times)
    assert listed["schemes"] == ["w4a16g64", "w8a16g64", "w16a16"]
    answer = client.get(f"/v1/latency-profiles/{stored.key}")
    assert read_profile(answer.content) == stored
    assert f'filename="latency-{stored.key}.json"' in answer.headers["content-disposition"]


@pytest.mark.parametrize(("key", "status"), [("0" * 16, 404), ("nothing", 422)])
def test_a_profile_that_is_not_there_is_a_problem(client: TestClient, key: str, status: int) -> None:
    answer = client.get(f"/v1/latency-profiles/{key}")
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.usefixtures("stored")
def test_a_search_within_what_the_device_can_do_is_accepted(client: TestClient) -> None:
    created = client.post("/v1/searches", json=asked())
    assert created.status_code == 202
    assert created.json()["budgets"] == {"latency_ms": 50}
    assert created.json()["request"]["latency"] == {"profile": DEVICE, "tokens": 16}


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(
    ("changes", "field", "told"),
    [
        ({"budgets": {"latency_ms": 0.01}}, "budgets.latency_ms", "the smallest feasible value is"),
        ({"latency": None}, "latency", f"needs a profile; there are: {DEVICE}"),
        ({"latency": {"profile": "H200"}}, "latency.profile", f"there are: {DEVICE}"),
        ({"model": "org/unseen", "latency": {"profile": "H200"}}, "latency.profile", f"there are: {DEVICE}"),
        ({"latency": {"profile": DEVICE, "tokens": 2}}, "latency", "has no time of"),
        ({"latency": {"profile": DEVICE, "colour": "blue"}}, "latency.colour", "accepted: profile, tokens"),
        ({"latency": {"tokens": 2}}, "latency.profile", "latency.profile is required"),
        ({"latency": {"profile": DEVICE, "tokens": 0}}, "latency.tokens", "greater than or equal to 1"),
        ({"latency": {"profile": "two\nlines"}}, "latency.profile", "a device with a stored profile"),
        ({"space": {"schemes": ["w3a16"]}}, "latency", "has no time of w3a16 of 384 × 384 by 16 tokens"),
        ({"budgets": {"limits": {"*": {"colour": 1}}}}, "budgets.limits.*.colour", "accepted: avg_bits, size_mb"),
    ],
)
def test_what_cannot_succeed_is_refused_at_once(
    client: TestClient, changes: dict[str, Any], field: str, told: str
) -> None:
    answer = client.post("/v1/searches", json=asked(**changes))
    assert answer.status_code == 422, answer.text
    problem = answer.json()
    assert problem["field"] == field
    assert told in problem["detail"]
    assert problem["accepted"]


def test_a_budget_on_latency_without_any_profile_says_how_to_get_one(client: TestClient, engine: Engine) -> None:
    examples.store_model(engine)
    problem = client.post("/v1/searches", json=asked(latency=None)).json()
    assert "there is none yet" in problem["detail"]
    assert "bitfrontier latency profile" in problem["accepted"]


def test_other_budgets_on_what_a_search_does_not_count_are_refused(client: TestClient, engine: Engine) -> None:
    examples.finished_search(engine)
    answer = client.get("/v1/searches/1/frontier", params={"under": "latency_ms:5"})
    assert answer.status_code == 422
    assert answer.json()["field"] == "under"
    assert "avg_bits" in answer.json()["accepted"]


@pytest.mark.usefixtures("stored")
def test_the_page_the_terminal_and_the_table_show_latency_and_how_far_to_believe_it(
    client: TestClient, served: str, engine: Engine
) -> None:
    search_id = examples.finished_search(engine, **{name: asked()[name] for name in ("space", "latency")})
    page = client.get(f"/searches/{search_id}").text
    words = "The sum of the layers against a forward pass of the whole model: w16a16 −20%."
    assert words in page
    assert words in " ".join(run("show", str(search_id), url=served).output.split())
    frontier = client.get(f"/v1/searches/{search_id}/frontier").json()
    assert all(point["costs"]["latency_us"] > 0 for point in frontier["points"])
    assert "Latency of the layers, ms" in client.get(f"/searches/{search_id}/chart.json").text
    assert "latency_us" in client.get(f"/v1/searches/{search_id}/frontier?format=csv").text.splitlines()[0]


def test_a_profile_without_a_forward_pass_of_the_model_says_so() -> None:
    assert "no forward pass of this model" in latency_text({"profile": DEVICE, "tokens": 1, "crosscheck": []})


def test_a_profile_goes_from_one_service_to_another_as_a_file(
    served: str, stored: LatencyProfile, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("db.engine.connect", lambda: engine)
    put_profile(engine, replace(stored, device="another", times={}))
    assert DEVICE in run("latency", "list", url=served).output
    for name in (DEVICE, stored.key):
        file = tmp_path / "deep" / f"{name}.json"
        assert run("latency", "export", name, str(file), url=served).exit_code == 0
        assert read_profile(file.read_bytes()) == stored
    changed = replace(read_profile(file.read_bytes()), device="elsewhere")
    file.write_text(write_profile(changed))
    imported = run("latency", "import", str(file), url=served)
    assert imported.exit_code == 0, imported.output
    assert f"{len(changed.times)} products are known" in imported.output
    assert list_profiles(engine)[0] == changed


def test_a_file_that_is_no_profile_stores_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("db.engine.connect", lambda: engine)
    file = tmp_path / "profile.json"
    document = json.loads(write_profile(PROFILE))
    for content, told in (
        ("[" * 10_000, "no latency profile"),
        (" " * (MOST_BYTES + 5), "longer than a latency profile"),
        (json.dumps(document | {"device": "\x1b[31m"}), "device of a latency profile"),
        (json.dumps(document | {"version": 9}), "version"),
    ):
        file.write_text(content)
        result = run("latency", "import", str(file), url="")
        assert result.exit_code == 2
        assert told in " ".join(result.output.split())
        assert isinstance(result.exception, SystemExit), "no traceback"
        assert "\x1b[31m" not in result.output
    assert "cannot be read" in run("latency", "import", str(tmp_path), url="").output
    assert "cannot be read" in run("latency", "import", str(tmp_path / "none"), url="").output
    assert list_profiles(engine) == []


def test_commands_without_a_profile_say_what_to_do(served: str, engine: Engine, tmp_path: Path) -> None:
    assert "bitfrontier latency profile MODEL" in run("latency", "list", url=served).output
    result = run("latency", "export", "H100", str(tmp_path / "h100.json"), url=served)
    assert result.exit_code == 2
    assert "no latency profile 'H100'" in result.output
    assert not (tmp_path / "h100.json").exists()


@pytest.mark.usefixtures("stored")
def test_a_search_on_the_command_line_names_the_profile(served: str) -> None:
    arguments = ["--budget", "latency_ms=0.01", "--latency-profile", DEVICE, "--tokens", "16"]
    result = run("search", examples.MODEL, *arguments, "--schemes", ",".join(SCHEMES), url=served)
    assert result.exit_code == 3
    assert "the smallest feasible value is" in result.output
    assert "latency_ms" in result.output


def test_profiling_is_left_to_the_process_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def start(arguments: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(arguments)
        return subprocess.CompletedProcess(arguments, 3)

    monkeypatch.setattr(subprocess, "run", start)
    options = ["--tokens", "1", "--tokens", "16", "--schemes", "w8a8", "--device", "cuda:1", "--again"]
    assert run("latency", "profile", "org/name", *options, url="").exit_code == 3
    assert started == [[sys.executable, "-m", "workers", "latency", *options, "--", "org/name"]]
