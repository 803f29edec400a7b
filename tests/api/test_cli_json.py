"""`--json` on every command: one document on standard output, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from typer.main import get_command

from api.catalog import LatencyProfileDocument, ModelDocument
from api.cli import app
from api.commands import processes
from api.documents import FrontierDocument, SearchDocument
from db.latency import list_profiles
from search.latency_profile import write_profile
from search.request import SearchRequest
from tests.api import examples
from tests.api.terminal import a_worker, finish, run
from tests.models import tiny_bert
from tests.search.profiles import profile_of

Told = Callable[..., Any]
PROFILE = profile_of(examples.encoder(), ["w4a16g64", "w8a16g64"], (1, 16))


@pytest.fixture
def told(served: str, engine: Engine, postgres_url: str) -> Told:
    """What a command prints with `--json`, parsed; it must have ended well."""

    def told(*arguments: str, code: int = 0) -> Any:
        result = run(*arguments, "--json", url=served, BITFRONTIER_DATABASE_URL=postgres_url)
        assert result.exit_code == code, result.output
        assert result.stderr == ""
        return json.loads(result.stdout)

    return told


def commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every command with its path."""
    return [
        found
        for name, command in group.commands.items()
        for found in (commands(command, (*path, name)) if hasattr(command, "commands") else [((*path, name), command)])
    ]


def test_every_command_has_it() -> None:
    for path, command in commands(get_command(app)):
        assert "--json" in {name for option in command.params for name in option.opts}, path


def test_a_search_and_its_results(told: Told, engine: Engine, tmp_path: Path) -> None:
    examples.store_model(engine)
    asked = ["search", examples.MODEL, "-b", "avg_bits=5.25", "--target", "vllm"]
    assert SearchRequest.model_validate(told(*asked, "--dry-run")).budgets.avg_bits == 5.25
    with a_worker(engine, finish):
        found = told(*asked, "--output", str(tmp_path))
    search = SearchDocument.model_validate(found["search"])
    assert (search.id, search.state) == (1, "succeeded")
    frontier = FrontierDocument.model_validate(found["frontier"])
    assert frontier.best in {point.number for point in frontier.points}
    assert {Path(path).name for path in found["files"]} == {path.name for path in tmp_path.iterdir()}
    assert told("follow", "1") == told("show", "1") | {"files": []}
    assert told("show", "1", "--under", "avg_bits=4.6")["frontier"]["best_under"] is not None
    assert SearchDocument.model_validate(told(*asked, "--detach")).state == "queued"
    assert told("cancel", "2")["state"] == "cancelled"
    assert [one["id"] for one in told("list")["searches"]] == [2, 1]
    assert [one["id"] for one in told("list", "--state", "succeeded", "--model", examples.MODEL)["searches"]] == [1]


def test_sensitivities_and_exports(told: Told, engine: Engine, tmp_path: Path) -> None:
    search = str(examples.finished_search(engine))
    assert set(told("sensitivities", search)["tables"]) == {"hessian_trace", "kl", "pqi", "lrp"}
    for name in ("table.csv", "table.parquet", "table.json"):
        assert told("sensitivities", search, "--output", str(tmp_path / name))["file"] == str(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    exported = told("export", search, "--point", "9", "--format", "vllm")
    assert json.loads(exported["content"])["quant_method"] == "compressed-tensors"
    file = tmp_path / "config.json"
    assert told("export", search, "--point", "9", "--output", str(file))["file"] == str(file)
    formats = {one["name"]: one for one in told("export", "--list")["exports"]}
    here = {one["name"]: one for one in told("export", search, "--point", "9", "--list")["exports"]}
    assert formats.keys() == here.keys() >= {"json", "csv", "vllm"}
    assert all(one["carries"] and one["use"] for one in formats.values())
    assert here["json"]["refused"] is None
    assert f"{search} --point 9" in here["vllm"]["command"]
    assert any(one["refused"] for one in here.values()), "some cannot carry an encoder"


def test_keys(told: Told) -> None:
    made = told("keys", "create", "ci", "--scope", "read")
    assert (made["name"], made["scopes"], made["token"][:3]) == ("ci", ["read"], "bf_")
    (listed,) = told("keys", "list")["keys"]
    assert "token" not in listed
    assert (listed["name"], listed["open_searches"], listed["revoked_at"]) == ("ci", 0, None)
    assert told("keys", "revoke", "ci")["revoked_at"]


def test_latency_profiles(told: Told, engine: Engine, tmp_path: Path) -> None:
    assert told("latency", "list") == {"profiles": []}
    file = tmp_path / "profile.json"
    file.write_text(write_profile(PROFILE))
    assert LatencyProfileDocument.model_validate(told("latency", "import", str(file))).device == PROFILE.device
    (profile,) = told("latency", "list")["profiles"]
    written = tmp_path / "again.json"
    assert told("latency", "export", PROFILE.device, str(written)) == {"key": profile["key"], "file": str(written)}
    assert list_profiles(engine)[0].key == profile["key"]


def test_models(told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFRONTIER_MODELS", str(tmp_path))
    assert told("models", "list") == {"models": []}
    source = tiny_bert(tmp_path / "source")
    added = ModelDocument.model_validate(told("models", "add", "tiny", str(source)))
    assert (added.name, added.architecture) == ("tiny", "BertModel")
    assert [model["name"] for model in told("models", "list")["models"]] == ["tiny"]


def test_what_a_process_refuses_is_one_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(asked: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(asked, 1, "", "a warning\nfolder has no config.json\n")

    monkeypatch.setattr(subprocess, "run", refuse)
    for command in (["models", "add", "tiny", "folder"], ["latency", "profile", "tiny"]):
        refused = run(*command, "--json", url="")
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert json.loads(refused.stderr)["detail"] == "folder has no config.json"


@pytest.mark.parametrize(("command", "keys"), [("api", {"url", "access"}), ("worker", {"pid"})])
def test_processes_say_where_they_are(
    told: Told, monkeypatch: pytest.MonkeyPatch, command: str, keys: set[str]
) -> None:
    # What takes the place of this process is tested where processes are; here, what it prints before.
    monkeypatch.setattr(processes, "_become", lambda arguments: None)
    monkeypatch.setenv("BITFRONTIER_LOG_FORMAT", "text")
    monkeypatch.setenv("BITFRONTIER_AUTH", "")
    assert told(command).keys() == keys


def test_a_request_comes_from_a_file(told: Told, tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    file.write_text(json.dumps({"model": "m", "budgets": {"avg_bits": 4, "size_mb": 9}, "optimizer": {"points": 5}}))
    asked = told("search", "--request", str(file), "-b", "avg_bits=5", "--evaluations", "9", "--dry-run")
    assert asked == {
        "model": "m",
        "budgets": {"avg_bits": 5, "size_mb": 9},
        "optimizer": {"points": 5, "evaluations": 9},
    }
    piped = subprocess.run(
        [sys.executable, "-m", "api.cli", "search", "other", "--request", "-", "--dry-run", "--json"],
        input=file.read_bytes(),
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    )
    assert json.loads(piped.stdout)["model"] == "other"
