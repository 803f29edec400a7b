"""Whatever moment a worker dies or stalls at, another ends the search as if nothing had happened."""

import random
import signal
import time
from collections.abc import Callable

import pytest

from db.searches import get_search
from tests.faults.records import Record, assert_undisturbed
from tests.faults.service import Service
from tests.faults.traps import HOLD

pytestmark = pytest.mark.long

STAGES = ["profile", "sensitivity", "baselines", "optimize", "measure", "refine", "accept"]
SLEEPER = "sleeper"

Kill = Callable[[Service, str], None]


def kill_while_it_writes(service: Service, stage: str) -> None:
    trap = service.traps.lay("searches", "UPDATE", HOLD, when=f"NEW.stage = '{stage}'", skip=1)
    worker = service.worker()
    service.until(lambda: trap.holds, f"a worker writes of {stage}")
    worker.kill()
    trap.lift()
    service.expire()


def kill_between_writes(service: Service, stage: str) -> None:
    worker = service.worker()
    service.until_told("progress", stage=stage)
    worker.kill()
    service.expire()


@pytest.mark.parametrize("kill", [kill_while_it_writes, kill_between_writes])
def test_a_worker_killed_in_every_stage_costs_nothing(service: Service, reference: Record, kill: Kill) -> None:
    service.post()
    for stage in STAGES:
        kill(service, stage)
    service.worker()
    service.until_ended()
    service.stop()
    assert_undisturbed(service, reference)


def test_a_worker_killed_while_it_evolves_costs_nothing(service: Service, evolved: Record) -> None:
    service.post("evolution")
    kill_while_it_writes(service, "evolve")
    kill_between_writes(service, "evolve")
    service.worker()
    service.until_ended()
    service.stop()
    assert_undisturbed(service, evolved)


def test_workers_killed_at_any_moment_cost_nothing(service: Service, reference: Record) -> None:
    """Their leases run out by themselves."""
    moments = random.Random(6)
    service.post()
    for _ in range(3):
        attempt = get_search(service.engine, service.search_id).attempt
        worker = service.worker()
        service.until(
            lambda attempt=attempt: get_search(service.engine, service.search_id).attempt > attempt, "it is claimed"
        )
        time.sleep(moments.uniform(0, 0.5))
        worker.kill()
    service.worker()
    service.until_ended()
    service.stop()
    assert_undisturbed(service, reference)


def test_a_worker_that_slept_through_its_lease_writes_nothing_when_it_wakes(
    service: Service, reference: Record
) -> None:
    service.create_role(SLEEPER)
    service.post()
    stalled = service.worker(role=SLEEPER)
    service.until_told("progress", stage="sensitivity")
    stalled.send(signal.SIGSTOP)
    service.worker()
    service.until_told("progress", stage="measure")
    service.traps.witness()
    stalled.send(signal.SIGCONT)
    service.until_ended()
    service.until(lambda: "was taken from" in stalled.log.read_text(), "the sleeper has noticed")
    service.stop()
    assert {table for table, _ in service.traps.witnessed(SLEEPER)} <= {"workers"}
    assert_undisturbed(service, reference)


def test_a_worker_that_stalls_in_a_transaction_keeps_nobody_waiting(service: Service, reference: Record) -> None:
    """It holds the row of the search, until the server ends what is idle for longer than a lease."""
    service.create_role(SLEEPER)
    service.post()
    trap = service.traps.lay("searches", "UPDATE", HOLD, when="NEW.stage = 'measure'", skip=1)
    stalled = service.worker(role=SLEEPER)
    service.until(lambda: trap.holds, "it writes")
    stalled.send(signal.SIGSTOP)
    trap.open()
    service.worker()
    service.until_ended()
    service.traps.witness()
    stalled.send(signal.SIGCONT)
    service.until(lambda: "was taken from" in stalled.log.read_text(), "the sleeper has noticed")
    service.stop()
    assert {table for table, _ in service.traps.witnessed(SLEEPER)} <= {"workers"}
    assert_undisturbed(service, reference)
