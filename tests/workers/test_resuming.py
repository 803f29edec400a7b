"""Searches that are cut short, by their process's end or by a person; and what of them the next finds."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from safetensors.torch import load_file, save_file
from sqlalchemy import Engine, func, select

from db import queue
from db.candidates import candidates
from db.events import events_after
from db.models import put_model
from db.searches import Search, get_search
from db.studies import study_name, study_storage
from db.tables import ResultRow
from tests.aside import wait_until
from tests.workers.searching import SCHEMES, Counting, ask, claim, forget_results, work
from workers.evaluator import EvaluatorSpec
from workers.pipeline import run_search
from workers.pools import InProcessPool, Pool
from workers.worker import Worker

pytestmark = pytest.mark.long


def left_behind(engine: Engine, search: Search) -> tuple[object, ...]:
    """What there is of a finished search, but for times and attempts."""
    summary, events = get_search(engine, search.id).summary, events_after(engine, search.id, 0)
    measured = [event.data for event in events if event.kind == "measured"]
    notices = [event.data for event in events if event.kind == "notice"]
    return candidates(engine, search.id), timeless(summary), measured, notices


def timeless(value: object) -> object:
    if isinstance(value, dict):
        return {name: timeless(inner) for name, inner in value.items() if "seconds" not in name}
    return value


BLOCKS, CHANNELS = {"granularity": "block"}, {"granularity": "channels", "channels": 48}


@pytest.mark.parametrize(("method", "units"), [("refine", BLOCKS), ("evolution", BLOCKS), ("refine", CHANNELS)])
def test_a_killed_attempt_loses_at_most_the_task_it_was_in(
    digits: Engine, method: str, units: dict[str, object]
) -> None:
    """And nothing else shows: not in the candidates, nor what they are told to be, nor what was computed."""
    asked = {
        "space": {"schemes": SCHEMES} | units,
        "optimizer": {"method": method, "points": 4, "evaluations": 14},
        "sensitivity": ["fisher", "kl"],
    }
    search, pools = ask(digits, **asked), list[Counting]()

    def with_lives(lives: float, size: int) -> Callable[[EvaluatorSpec], Pool]:
        def pool_for(spec: EvaluatorSpec) -> Pool:
            pools.append(Counting(spec, lives, size))
            return pools[-1]

        return pool_for

    work(digits, with_lives(float("inf"), 5))
    whole, expected = pools.pop(), left_behind(digits, search)
    forget_results(digits)

    again, seen = ask(digits, **asked), 0
    for lives, size in [(whole.computed // 3, 5), (whole.computed // 3, 1), (float("inf"), 9)]:
        attempt = claim(digits, f"worker with {lives} lives", seconds=0.05)
        try:
            run_search(digits, attempt, with_lives(lives, size), lambda: None)
        except KeyboardInterrupt:
            time.sleep(0.1)
        measured = sum(bool(one.metrics) for one in candidates(digits, again.id))
        assert measured >= seen, "what was shown still is"
        seen = measured
    done = get_search(digits, again.id)
    assert (done.state, done.attempt) == ("succeeded", 3), done.error
    assert sum(pool.computed for pool in pools) == whole.computed
    assert left_behind(digits, again) == expected
    stages = [event.data for event in events_after(digits, again.id, 0) if event.kind == "stage"]
    assert sorted({stage["attempt"] for stage in stages}) == [1, 2, 3]
    ends = [event.data["stage"] for event in events_after(digits, again.id, 0) if event.kind == "stage_end"]
    assert ends == [stage["stage"] for stage in stages if stage["attempt"] == 3], "each was tallied once"
    if method == "evolution":
        losses = [
            [
                trial.values[0]
                for trial in optuna.load_study(study_name=study_name(id), storage=study_storage(digits)).trials
            ]
            for id in (search.id, again.id)
        ]
        assert losses[0] == losses[1] != []


def test_a_refinement_expands_the_loss_and_another_search_finds_it_again(digits: Engine) -> None:
    asked = {
        "space": {"schemes": SCHEMES, "granularity": "block"},
        "optimizer": {"points": 4, "evaluations": 28},
    }
    first = ask(digits, **asked)
    work(digits)
    with digits.begin() as connection:
        assert connection.scalar(select(func.count()).where(ResultRow.kind == "expansion")) > 0
    again, pools = ask(digits, **asked), list[Pool]()

    def pool_for(spec: EvaluatorSpec) -> Pool:
        pools.append(InProcessPool(spec))
        return pools[-1]

    work(digits, pool_for)
    found = get_search(digits, again.id)
    assert found.summary is not None
    assert (found.summary["computed"], found.summary["reused_from"]) == (0, [first.id])
    assert [pool.held for pool in pools] == [0], "no model was loaded"
    assert [one.allocation for one in candidates(digits, again.id)] == [
        one.allocation for one in candidates(digits, first.id)
    ]


def test_a_worker_fails_what_cannot_be_done_and_goes_on(digits: Engine, worker: Worker) -> None:
    bad, good = ask(digits, model="nobody"), ask(digits, space={"schemes": SCHEMES, "pin": {"*": "w4a16"}})
    wait_until(lambda: get_search(digits, good.id).state == "succeeded")
    failed = get_search(digits, bad.id)
    assert failed.state == "failed"
    assert failed.error is not None
    assert failed.error["field"] == "model"
    assert "nobody" in failed.error["detail"]


def test_a_running_search_is_cancelled_within_seconds(digits: Engine, worker: Worker) -> None:
    search = ask(digits, optimizer={"points": 200, "evaluations": 1000})
    wait_until(lambda: get_search(digits, search.id).stage == "sensitivity")
    queue.cancel(digits, search.id)
    wait_until(lambda: get_search(digits, search.id).state == "cancelled")


def test_a_stopped_worker_hands_its_search_back(digits: Engine, worker: Worker) -> None:
    search = ask(digits, optimizer={"points": 200, "evaluations": 1000})
    wait_until(lambda: get_search(digits, search.id).stage == "sensitivity")
    worker.stop()
    wait_until(lambda: get_search(digits, search.id).state == "queued")


def test_a_model_that_was_replaced_is_loaded_again(
    digits: Engine, worker: Worker, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "replaced"
    shutil.copytree(model_folder("digits_vit"), folder)
    put_model(digits, "replaced", str(folder), None)
    digests = []
    for _ in range(2):
        search = ask(digits, model="replaced", sensitivity=["hessian_trace"], space={"schemes": ["w4a16"]})
        wait_until(lambda search=search: get_search(digits, search.id).state == "succeeded")
        digests.append((get_search(digits, search.id).summary or {})["model_digest"])
        weights = load_file(folder / "model.safetensors")
        save_file(
            {name: weight * 1.01 for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"}
        )
    assert digests[0] != digests[1]
