"""What the tests of faults share: the service that they disturb, and what searches leave that nothing disturbed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

pytest.register_assert_rewrite("tests.faults.records", "tests.faults.service")

from db.models import put_model  # noqa: E402
from db.tables import Base  # noqa: E402
from tests import models  # noqa: E402
from tests.faults import processes  # noqa: E402
from tests.faults.records import Record, assert_nothing_left_open, record  # noqa: E402
from tests.faults.service import Service  # noqa: E402
from tests.faults.traps import let_commits_wait  # noqa: E402

LEASE_SECONDS = 1

Undisturbed = Callable[[str], tuple[Record, set[tuple[str, str]]]]


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of processes to come, once there is one to fork them from."""
    folder = tmp_path_factory.mktemp("faults")
    settings = {"BITFRONTIER_LEASE_SECONDS": str(LEASE_SECONDS), "BITFRONTIER_DATA": str(folder), "HF_HUB_OFFLINE": "1"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "BITFRONTIER_"))}
    processes.prepare(inherited | settings)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(models.tiny_llama(tmp_path_factory.mktemp("tiny-llama")))


@pytest.fixture(scope="session")
def undisturbed(migrated_engine: Engine, postgres_url: str, nursery: Path, tiny_llama: str) -> Undisturbed:
    """Runs a search by a method; what it leaves, and the tables that its worker has written and how."""

    @cache
    def run(method: str) -> tuple[Record, set[tuple[str, str]]]:
        with migrated_engine.begin() as connection:
            connection.execute(text(f"TRUNCATE {', '.join(Base.metadata.tables)} RESTART IDENTITY"))
        put_model(migrated_engine, "tiny-llama", tiny_llama, None)
        service = Service(migrated_engine, postgres_url, nursery)
        service.post(method)
        service.traps.witness()
        service.worker()
        service.until_ended()
        service.stop()
        left = record(migrated_engine, service.search_id), service.traps.witnessed()
        service.close()
        return left

    return run


@pytest.fixture(scope="session")
def reference(undisturbed: Undisturbed) -> Record:
    """What an undisturbed search leaves."""
    return undisturbed("refine")[0]


@pytest.fixture(scope="session")
def written(undisturbed: Undisturbed) -> set[tuple[str, str]]:
    """The tables that the worker of an undisturbed search writes, and how."""
    return undisturbed("refine")[1]


@pytest.fixture(scope="session")
def evolved(undisturbed: Undisturbed) -> Record:
    """What an undisturbed search by evolution leaves."""
    return undisturbed("evolution")[0]


@pytest.fixture
def service(engine: Engine, postgres_url: str, nursery: Path, tiny_llama: str) -> Iterator[Service]:
    """A service with one model and nothing to do yet."""
    let_commits_wait(engine)
    put_model(engine, "tiny-llama", tiny_llama, None)
    service = Service(engine, postgres_url, nursery)
    yield service
    service.close()
    assert_nothing_left_open(engine)
