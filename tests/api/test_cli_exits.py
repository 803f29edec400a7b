"""What a script learns from how a command ends: every exit code, provoked for real; and what Ctrl-C does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine

from api.commands.service import free_port
from db.queue import Claim, cancelled, fail, succeed
from db.searches import get_search
from tests.api import examples
from tests.api.terminal import Terminal, a_worker, finish, run, terminal
from tests.aside import wait_until

PROBLEM = {"type": "urn:x:no-data", "title": "Too little data", "status": 422, "detail": "3 of 64", "field": "samples"}


def failing(engine: Engine, held: Claim) -> None:
    fail(engine, held, PROBLEM)


def fitting_nothing(engine: Engine, held: Claim) -> None:
    succeed(engine, held, {})


def test_0_when_it_is_done(served: str, engine: Engine) -> None:
    search = str(examples.finished_search(engine))
    for arguments in (["show", search], ["follow", search], ["list"], ["cancel", search], ["--version"], ["--help"]):
        assert run(*arguments, url=served).exit_code == 0, arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], ["No such command"]),
        (["search", examples.MODEL], ["at least one budget"]),
        (["search", "--budget", "avg_bits=5"], ["name a model"]),
        (["search", examples.MODEL, "-b", "4.25"], ["'4.25' is no budget", "avg_bits=4.25", "MB"]),
        (["search", examples.MODEL, "-b", "avg_bits=5", "--local", "--detach"], ["--detach"]),
        (["search", "nothing", "-b", "avg_bits=5"], ["model", "nothing", examples.MODEL]),
        (["search", examples.MODEL, "-b", "bits=4"], ["budgets.bits", "avg_bits"]),
        (["search", examples.MODEL, "-b", "avg_bits=four"], ["budgets.avg_bits", "number"]),
        (["search", examples.MODEL, "-b", "avg_bits=nan"], ["'nan' is no finite number for avg_bits"]),
        (["search", examples.MODEL, "-b", "avg_bits=1e999", "--dry-run"], ["no finite number", "--budget"]),
        (["search", examples.MODEL, "--limit", "x:avg_bits=inf", "--dry-run"], ["no finite number", "--limit"]),
        (["search", examples.MODEL, "-b", "avg_bits=5", "--target", "x"], ["accepted: generic", "vllm"]),
        (["search", examples.MODEL, "-b", "avg_bits=5", "--schemes", "w4"], ["space.schemes"]),
        (["search", examples.MODEL, "-b", "avg_bits=5", "--sensitivity", "x"], ["sensitivity", "fisher"]),
        (["search", examples.MODEL, "-b", "avg_bits=5", "--method", "guess"], ["optimizer.method", "evolution"]),
        (["search", examples.MODEL, "-b", "avg_bits=5", "--objective", "size_mb"], ["loss_increase"]),
        (["search", examples.MODEL, "--limit", "nothing:avg_bits=5"], ["limits.nothing", "no searched layer"]),
        (["search", examples.MODEL, "--pin", "x", "-b", "avg_bits=5"], ["PATTERN=SCHEME"]),
        (["search", "--request", "nowhere.json"], ["nowhere.json cannot be read"]),
        (["show", "99"], ["no search 99"]),
        (["show", "1", "--under", "avg_bits=four"], ["no number for avg_bits"]),
        (["follow", "99"], ["no search 99"]),
        (["cancel", "99"], ["no search 99"]),
        (["sensitivities", "99"], ["no search 99"]),
        (["export", "99", "--point", "1"], ["no search 99"]),
        (["export", "99"], ["--point"]),
    ],
)
def test_2_when_it_was_asked_wrongly(served: str, engine: Engine, arguments: list[str], words: list[str]) -> None:
    examples.store_model(engine)
    for more in ([], ["--json"]):
        result = run(*arguments, *more, url=served)
        assert result.exit_code == 2, result.output
        assert isinstance(result.exception, SystemExit), "no traceback"
        assert result.stdout == "", "what goes wrong is said on standard error"
        told = json.loads(result.stderr)["detail"] if more else result.stderr
        if more:
            assert result.stderr.count("\n") == 1, "one line"
        else:
            for word in words:
                assert word in told, result.output


@pytest.mark.parametrize(
    "text", ["[" * 60_000, "[" * 900 + "]" * 900, '{"budgets": {"avg_bits": NaN}}', '{"budgets": {"avg_bits": 1e999}}']
)
def test_2_when_a_request_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "request.json").write_text(text)
    result = run("search", "m", "-b", "5bits", "--request", str(tmp_path / "request.json"), "--dry-run", url="")
    assert (result.exit_code, "request.json cannot be read" in result.stderr) == (2, True), result.output


def test_2_when_a_file_cannot_be_written(served: str, engine: Engine, tmp_path: Path) -> None:
    search, nowhere = str(examples.finished_search(engine)), tmp_path / "a file" / "x.csv"
    nowhere.parent.touch()
    commands = [["export", search, "--point", "5"], ["sensitivities", search], ["follow", search]]
    for command in commands:
        result = run(*command, "--output", str(nowhere), url=served)
        assert result.exit_code == 2, result.output
        assert isinstance(result.exception, SystemExit), "no traceback"
        assert f"{nowhere} cannot be written: " in result.stderr


def test_3_when_nothing_meets_the_budgets(served: str, engine: Engine) -> None:
    examples.store_model(engine)
    alone = run("search", examples.MODEL, "-b", "avg_bits=1", url=served)
    assert alone.exit_code == 3
    header, row = [line.split() for line in alone.stderr.splitlines()[-2:]]
    assert header[:3] == ["budget", "asked", "for"]
    assert row[:3] == ["avg_bits", "1", "4.25"]
    together = ["-b", "avg_bits=4.3", "-b", "30MB", "--pin", "*.output.dense=w8a16g64"]
    both = run("search", examples.MODEL, *together, "--json", url=served)
    assert both.exit_code == 3, both.output
    assert json.loads(both.stderr)["type"].endswith("infeasible-budget")


def test_3_when_no_measured_configuration_fits(served: str, engine: Engine) -> None:
    with a_worker(engine, fitting_nothing):
        found = run("search", "org/name", "-b", "loss_increase=0.001", url=served)
    assert found.exit_code == 3, found.output
    assert "No measured configuration fits every budget" in found.stdout
    search = str(examples.finished_search(engine))
    under = run("show", search, "--under", "3bits", url=served)
    assert (under.exit_code, "No measured configuration keeps" in under.stdout) == (3, True)


def test_4_when_the_search_failed_or_was_cancelled(served: str, engine: Engine) -> None:
    with a_worker(engine, failing):
        failed = run("search", "org/name", "-b", "avg_bits=5", url=served)
    assert failed.exit_code == 4
    assert "Too little data: 3 of 64" in failed.stderr
    with a_worker(engine, cancelled):
        assert run("search", "org/name", "-b", "avg_bits=5", url=served).exit_code == 4
    for number, words in (("1", "3 of 64"), ("2", "was cancelled")):
        for command in ("show", "follow"):
            ended = run(command, number, "--json", url=served)
            assert ended.exit_code == 4
            assert words in json.loads(ended.stderr)["detail"]


def test_5_when_nothing_answers() -> None:
    for command in (["search", "m", "-b", "avg_bits=5"], ["models", "list"]):
        away = run(*command, url=f"http://127.0.0.1:{free_port()}")
        assert away.exit_code == 5, away.output
        assert "bitfrontier up" in away.stderr
        assert away.stdout == ""
    assert run("keys", "list", url="", BITFRONTIER_DATABASE_URL="mysql://here/none").exit_code == 5


def test_plain_lines_where_nobody_looks(served: str, engine: Engine) -> None:
    search = str(examples.finished_search(engine))
    lines = run("follow", search, url=served).stderr.splitlines()
    assert [line for line in lines if line.startswith("kl, about 41 s: 36 of 36")]
    assert not any("\x1b" in line or "?" in line for line in lines)


@contextmanager
def following(served: str, engine: Engine, *arguments: str) -> Iterator[tuple[Terminal, int, Claim]]:
    """`bitfrontier follow` on a terminal, of a search that runs."""
    search_id, held = examples.claimed_search(engine)
    examples.enter_metric(engine, held, "kl", 20.0, 41.0)
    with terminal("follow", str(search_id), *arguments, BITFRONTIER_URL=served) as opened:
        opened.wait_for("kl, about 41 s")
        yield opened, search_id, held


def test_ctrl_c_detaches(served: str, engine: Engine) -> None:
    with following(served, engine) as (opened, search_id, _):
        opened.ctrl_c()
        assert opened.leave() == 130
        shown = " ".join(opened.shown.split())
        assert f"search {search_id} goes on" in shown
        assert f"bitfrontier cancel {search_id}" in shown
        assert "Traceback" not in shown
    assert not get_search(engine, search_id).cancel_requested


def test_ctrl_c_cancels_where_it_shall(served: str, engine: Engine) -> None:
    with following(served, engine, "--on-interrupt", "cancel", "--json") as (opened, search_id, held):
        opened.ctrl_c()
        assert opened.leave() == 130
        assert '"type": "urn:bitfrontier:problem:interrupted"' in opened.shown.replace("\r\n", "")
    wait_until(lambda: get_search(engine, search_id).cancel_requested)
    cancelled(engine, held)


def test_bars_move_on_a_terminal(served: str, engine: Engine) -> None:
    with following(served, engine) as (opened, _, held):
        finish(engine, held)
        assert opened.leave() == 0
        assert "━" in opened.shown
        assert "★ best" in opened.shown


def test_the_program_itself_ends_with_the_codes(served: str) -> None:
    with terminal("show", "99", BITFRONTIER_URL=served) as opened:
        assert opened.leave() == 2
        assert "no search 99" in opened.shown
