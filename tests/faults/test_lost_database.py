"""Whatever the database does in the middle of a search, its worker goes on where it was."""

import random
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from db import embedded
from db.engine import connect, migrate
from db.models import put_model
from db.searches import get_search
from db.studies import study_storage
from tests.faults.records import Record, assert_undisturbed
from tests.faults.service import Service
from tests.faults.traps import DISK_FULL, DROP, HOLD, LOSE_ANSWER

pytestmark = pytest.mark.long

WRITES = {
    "the search": {
        "claim": ("searches", "UPDATE", "NEW.attempt > OLD.attempt"),
        "heartbeat": ("searches", "UPDATE", "NEW.lease_until > OLD.lease_until AND NEW.attempt = OLD.attempt"),
        "progress": ("searches", "UPDATE", "NEW.done > OLD.done"),
        "summary": ("searches", "UPDATE", "NEW.summary IS DISTINCT FROM OLD.summary AND NEW.state = 'running'"),
        "end": ("searches", "UPDATE", "NEW.state = 'succeeded'"),
    },
    "its events": {
        "state": ("events", "INSERT", "NEW.kind = 'state'"),
        "stage": ("events", "INSERT", "NEW.kind = 'stage'"),
        "progress": ("events", "INSERT", "NEW.kind = 'progress'"),
        "measured": ("events", "INSERT", "NEW.kind = 'measured'"),
        "stage_end": ("events", "INSERT", "NEW.kind = 'stage_end'"),
    },
    "its results and candidates": {
        "description": ("results", "INSERT", "NEW.kind = 'describe'"),
        "table": ("results", "INSERT", "NEW.kind = 'sensitivity'"),
        "measurement": ("results", "INSERT", "NEW.kind = 'measure'"),
        "proposed": ("candidates", "INSERT", "true"),
        "judged": ("candidates", "UPDATE", "true"),
    },
    "what it shares": {
        "inventory": ("models", "UPDATE", "true"),
        "worker": ("workers", "INSERT", "true"),
        "life": ("workers", "UPDATE", "true"),
        "first of a tally": ("tallies", "INSERT", "true"),
        "tally": ("tallies", "UPDATE", "true"),
    },
}
"""All that a worker writes: a table, an operation, and which of those on it. None shares a transaction with another of
its group."""
IN_THE_BACKGROUND = ("heartbeat", "life")


@pytest.mark.parametrize("group", WRITES)
def test_a_connection_lost_at_a_write_costs_nothing(service: Service, reference: Record, group: str) -> None:
    """At every kind once before its commit, and, when it is tried again, after its commit and before the answer."""
    service.post()
    lost: set[int] = set()
    traps = {
        kind: service.traps.lay(*write[:2], DROP, LOSE_ANSWER, when=write[2]) for kind, write in WRITES[group].items()
    }
    pause = service.traps.lay("results", "INSERT", HOLD)
    service.worker()

    def met(kinds: Iterable[str]) -> bool:
        lost.update(service.traps.cut())
        return all(traps[kind].met >= 2 for kind in kinds)

    service.until(lambda: met(kind for kind in traps if kind in IN_THE_BACKGROUND), "the worker shows that it lives")
    pause.open()
    service.until(lambda: met(traps) and len(lost) == len(traps), "a commit of every kind has lost its answer")
    service.until_ended()
    service.stop()
    assert get_search(service.engine, service.search_id).attempt == 1
    assert_undisturbed(service, reference)


def test_no_other_writes_are_known(written: set[tuple[str, str]]) -> None:
    """Leaving aside what a worker says last of itself."""
    known = {write[:2] for group in WRITES.values() for write in group.values()}
    assert written - {("workers", "DELETE")} == known


def test_a_connection_lost_while_a_study_is_shown_costs_nothing(service: Service, evolved: Record) -> None:
    study_storage(service.engine)
    service.post("evolution")
    trap = service.traps.lay("optuna.trials", "INSERT", DROP)
    service.worker()
    service.until_ended()
    service.stop()
    assert trap.met
    assert get_search(service.engine, service.search_id).attempt == 1
    assert_undisturbed(service, evolved)


def test_connections_lost_at_any_moment_cost_nothing(service: Service, reference: Record) -> None:
    moments = random.Random(6)
    service.create_role("unlucky")
    service.post()
    service.worker(role="unlucky")
    service.until_told("stage", stage="profile")
    for _ in range(8):
        time.sleep(moments.uniform(0, 0.2))
        service.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'unlucky'")
    service.until_ended()
    service.stop()
    assert get_search(service.engine, service.search_id).attempt == 1
    assert_undisturbed(service, reference)


def test_a_full_disk_is_waited_for(service: Service, reference: Record) -> None:
    service.post()
    writes = [("results", "INSERT"), ("events", "INSERT"), ("candidates", "INSERT")]
    full = [service.traps.lay(*write, skip=5, then=DISK_FULL) for write in writes]
    service.worker()
    while full:
        service.until(lambda: any(trap.met >= 2 for trap in full), "the worker tries again")
        full.remove(freed := next(trap for trap in full if trap.met >= 2))
        freed.lift()
    service.until_ended()
    service.stop()
    assert get_search(service.engine, service.search_id).attempt == 1
    assert_undisturbed(service, reference)


def test_a_database_that_is_killed_and_comes_back_costs_nothing(
    reference: Record, data_folder: Path, nursery: Path, tiny_llama: str
) -> None:
    folder = data_folder / "postgres"
    url = embedded.start(folder).render_as_string(hide_password=False)
    engine = connect(url)
    migrate(engine)
    put_model(engine, "tiny-llama", tiny_llama, None)
    service = Service(engine, url, nursery)
    service.post()
    service.worker()
    for stage in ("sensitivity", "refine"):
        service.until_told("progress", stage=stage)
        postmaster = psutil.Process(int((folder / "postmaster.pid").read_text().splitlines()[0]))
        postmaster.send_signal(signal.SIGKILL)
        embedded.start(folder)
        connect(url).dispose()
    service.until_ended()
    service.stop()
    assert get_search(engine, service.search_id).attempt == 1
    assert_undisturbed(service, reference)
    service.close()
    engine.dispose()
    embedded.leave(folder)
