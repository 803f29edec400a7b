"""`bitfrontier apply` as a person types it: of a search in the database, and of a document that was exported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from db import queue
from db.candidates import put_candidates
from db.models import put_model
from db.searches import create_search
from search.exports import render
from search.request import SearchRequest
from tests.workers.applying import SMALL, decompressed, measured_point
from tests.workers.conftest import ModelFolder
from tests.workers.searching import claim
from workers.__main__ import main
from workers.apply import Asked

BITFRONTIER = Path(sys.executable).with_name("bitfrontier")

Run = Callable[..., int]


@pytest.fixture
def point(engine: Engine, model_folder: ModelFolder) -> Asked:
    """Point 3 of search 1, which has measured it on the tiny Llama."""
    asked, evaluator = measured_point(model_folder("tiny_llama"), ["w4a16g64", "w6a16g32"])
    put_model(engine, "tiny", asked.source, evaluator.inventory)
    asked = replace(asked, exported=replace(asked.exported, model="tiny"))
    document = {
        "model": "tiny",
        "target": "vllm",
        "calibration": SMALL.model_dump(),
        "space": {"quantizer": asked.exported.quantizer},
        "budgets": {"avg_bits": 6},
    }
    create_search(engine, SearchRequest.model_validate(document))
    held = claim(engine)
    put_candidates(engine, held, [asked.exported.candidate])
    summary = {"model_digest": evaluator.inventory.digest, "data_digest": evaluator.data.digest}
    queue.succeed(engine, held, summary)
    return asked


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, postgres_url: str, own_logs: None) -> Iterator[Run]:
    """Runs `python -m workers apply` in this process."""
    monkeypatch.setenv("BITFRONTIER_DATABASE_URL", postgres_url)
    before = signal.getsignal(signal.SIGTERM)

    def start(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["workers", "apply", *map(str, arguments)])
        return main()

    yield start
    signal.signal(signal.SIGTERM, before)


def test_a_point_becomes_a_checked_checkpoint(point: Asked, postgres_url: str, tmp_path: Path) -> None:
    command = [str(BITFRONTIER), "apply", "1", "--point", "3", "--output", str(tmp_path / "out"), "--check", "--json"]
    environment = os.environ | {"BITFRONTIER_DATABASE_URL": postgres_url}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["model"], told["search"], told["point"]) == ("tiny", 1, 3)
    assert told["loss"] == point.exported.candidate.metrics["loss"]
    assert told["check"]["reloaded"] == pytest.approx(told["loss"], rel=1e-4)
    assert decompressed(tmp_path / "out").keys() == point.exported.schemes.keys()
    assert "quantized 14 of 14 layers" in done.stderr


def test_an_exported_document_is_applied_again(
    point: Asked, run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "bitfrontier.json"
    document.write_text(render("json", point.exported))
    assert run("--search", 1, "--point", 3, "--output", tmp_path / "one") == 0
    assert run("--config", document, "--output", tmp_path / "two") == 0
    for file in (tmp_path / "one").iterdir():
        same = tmp_path / "two" / file.name
        # The database keeps the keys of JSON in an order of its own.
        as_read = json.loads if file.suffix == ".json" else bytes
        assert as_read(file.read_bytes()) == as_read(same.read_bytes()), file.name
    assert f"vllm serve {tmp_path / 'two'}" in capfd.readouterr().out


def test_a_document_is_not_applied_to_another_model(
    engine: Engine, point: Asked, run: Run, tmp_path: Path, model_folder: ModelFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    put_model(engine, "other", str(model_folder("tiny_bert")), replace(point.exported.inventory, digest="e" * 64))
    document = tmp_path / "bitfrontier.json"
    document.write_text(render("json", point.exported))
    assert run("--config", document, "--model", "other", "--output", tmp_path / "out") == 2
    assert "'other' is not the model that bitfrontier.json was made for" in capfd.readouterr().err
    document.write_text("{}")
    assert run("--config", document, "--output", tmp_path / "out") == 2
    assert "not a bitfrontier/configuration document" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("quantizer", lambda document: document.update(quantizer="foo")),
        ("model.digest", lambda document: document["model"].update(digest=f"{document['model']['digest']}:bogus")),
        ("layers.0.name", lambda document: document["layers"][0].update(name="nowhere")),
    ],
)
def test_an_edited_document_is_refused_by_its_field(
    point: Asked,
    run: Run,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    field: str,
    change: Callable[[dict[str, Any]], None],
) -> None:
    document = json.loads(render("json", point.exported))
    change(document)
    (tmp_path / "edited.json").write_text(json.dumps(document))
    assert run("--config", tmp_path / "edited.json", "--output", tmp_path / "out", "--json") == 2
    problem = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert (problem["status"], problem["field"]) == (422, field)


@pytest.mark.parametrize(
    ("search", "number", "reason"), [(2, 3, "there is no search 2"), (1, 4, "search 1 has no point 4")]
)
def test_what_does_not_exist_is_named(
    point: Asked, run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], search: int, number: int, reason: str
) -> None:
    assert run("--search", search, "--point", number, "--output", tmp_path / "out", "--json") == 2
    problem: dict[str, Any] = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert problem["status"] == 404
    assert reason in problem["detail"]


def test_a_folder_that_is_taken_is_left_alone(
    point: Asked, run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert run("--search", 1, "--point", 3, "--output", tmp_path / "out") == 2
    assert "not empty" in capfd.readouterr().err
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_model_that_was_registered_anew_is_not_what_was_searched(
    engine: Engine, point: Asked, run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put_model(engine, "tiny", point.source, replace(point.exported.inventory, digest="e" * 64))
    assert run("--search", 1, "--point", 3, "--output", tmp_path / "out") == 2
    assert "no longer registered as it was searched" in capfd.readouterr().err


def test_who_is_interrupted_leaves_nothing(
    point: Asked, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupt)
    assert run("--search", 1, "--point", 3, "--output", tmp_path / "out") == 130
    assert "nothing was written" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_is_away_is_told(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BITFRONTIER_DATABASE_URL", "mysql://somewhere")
    assert run("--search", 1, "--point", 3, "--output", tmp_path / "out") == 5
    assert "must be Postgres" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["1", "--output", "x"], "--point"),
        (["--config", "f", "--point", "1", "--output", "x"], "--config"),
        (["1", "--point", "1", "--model", "m", "--output", "x"], "--model"),
    ],
)
def test_what_contradicts_itself_is_wrong_use(
    arguments: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from api import cli

    monkeypatch.setattr(sys, "argv", ["bitfrontier", "apply", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert reason in capfd.readouterr().err
