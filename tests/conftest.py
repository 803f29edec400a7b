"""Fixtures that every room's tests share: a real Postgres."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from db import embedded
from db.engine import connect, migrate
from db.studies import SCHEMA
from db.tables import Base


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


@pytest.fixture
def engine(migrated_engine: Engine) -> Engine:
    """An engine on the run's Postgres with all tables empty, ids that start at 1, and no studies."""
    tables = ", ".join(Base.metadata.tables)
    with migrated_engine.begin() as connection:
        connection.execute(text(f"TRUNCATE {tables} RESTART IDENTITY"))
        connection.execute(text(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE"))
    return migrated_engine


def _open_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="bitfrontier-test-"))
    folder.chmod(0o755)
    return folder
