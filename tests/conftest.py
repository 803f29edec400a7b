"""Fixtures that every room's tests share: a real Postgres."""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from db import embedded
from db.engine import connect, migrate
from db.logs import CHATTY
from db.studies import SCHEMA
from db.tables import Base
from scripts.model_roots import open_roots
from tests.running import (  # noqa: F401 - pytest looks for them here
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_report_teststatus,
    pytest_runtest_call,
    pytest_runtest_setup,
    pytest_runtest_teardown,
    pytest_xdist_make_scheduler,
)

open_roots()

SERVERS = ("uvicorn", "uvicorn.error", "uvicorn.access")


@pytest.fixture(scope="class")
def data_folder() -> Iterator[Path]:
    """An empty folder, shared by the tests of a class, that an embedded Postgres may live under.

    As root Postgres runs as another user, who must be able to enter; pytest's own folders are private.
    """
    folder = _open_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A running Postgres, for this test run only."""
    folder = _open_folder()
    url = embedded.start(folder / "postgres")
    yield url.render_as_string(hide_password=False)
    embedded.leave(folder / "postgres")
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def migrated_engine(postgres_url: str) -> Iterator[Engine]:
    """An engine on the run's Postgres with the schema in place; use `engine`."""
    engine = connect(postgres_url)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        # The data need not outlive the run, and emptying the tables is four times as fast without.
        connection.execute(text("ALTER SYSTEM SET fsync = off"))
        connection.execute(text("SELECT pg_reload_conf()"))
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def own_engine(migrated_engine: Engine) -> Iterator[Engine]:
    """An engine on a database of the module's own, with the schema in place: what a test leaves, the next one finds."""
    name = f"own_{secrets.token_hex(8)}"
    with migrated_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine = connect(migrated_engine.url.set(database=name).render_as_string(hide_password=False))
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def engine(migrated_engine: Engine) -> Engine:
    """An engine on the run's Postgres with all tables empty, ids that start at 1, and no studies."""
    tables = ", ".join(Base.metadata.tables)
    with migrated_engine.begin() as connection:
        connection.execute(text(f"TRUNCATE {tables} RESTART IDENTITY"))
        connection.execute(text(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE"))
    return migrated_engine


@pytest.fixture
def own_logs() -> Iterator[None]:
    """What a test makes of the logs of this process is taken back: else others would write where it did, and that is
    closed by then."""
    known = [logging.getLogger(), *map(logging.getLogger, (*CHATTY, *SERVERS, "transformers", "huggingface_hub"))]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in known]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def _open_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="bitfrontier-test-"))
    folder.chmod(0o755)
    return folder
