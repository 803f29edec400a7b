"""A search spread over a cluster ends as one that is not, whichever of its processes and machines die."""

import os

import psutil
import pytest

from db.searches import get_search
from tests.faults.records import Record, assert_undisturbed
from tests.faults.service import Service
from tests.workers.nodes import three_nodes

pytestmark = pytest.mark.long

AT_WORK = "ray::_Actor.call"
"""What Ray calls an evaluator's process while it is at an item."""


def kill_an_evaluator_at_work() -> bool:
    """Kill -9 one that is in the middle of an item, if there is one."""
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] != [AT_WORK]:
                continue
            process.suspend()
            if process.cmdline()[:1] == [AT_WORK]:
                process.kill()
                return True
            process.resume()
        except psutil.NoSuchProcess:
            continue
    return False


def test_an_evaluator_and_a_machine_that_die_cost_nothing(service: Service, reference: Record) -> None:
    with three_nodes() as cluster:
        service.post()
        service.worker(BITFRONTIER_POOL="ray", **{name: os.environ[name] for name in os.environ if name[:4] == "RAY_"})
        service.until_told("progress", stage="sensitivity")
        service.until(kill_an_evaluator_at_work, "an evaluator is at work")
        service.until_told("progress", stage="measure")
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        service.until_ended()
        service.stop()
    assert get_search(service.engine, service.search_id).attempt == 1
    assert_undisturbed(service, reference)
