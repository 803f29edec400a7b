from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, make_url, text
from sqlalchemy.exc import OperationalError

import db.engine
from db import embedded
from db.engine import connect, data_directory, database_url, migrate, to_json
from db.errors import DatabaseUnavailable
from db.searches import Search, create_search, get_search
from db.tables import Base
from tests.db.conftest import request_for


def test_the_migrated_schema_is_that_of_the_tables(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
        # Alembic compares neither the names of constraints nor checks.
        query = "SELECT conname FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND contype != 'n'"
        existing = set(connection.execute(text(query)).scalars())
    declared = {str(constraint.name) for table in Base.metadata.tables.values() for constraint in table.constraints}
    assert existing - {"alembic_version_pkc"} == declared


def test_three_processes_migrate_at_once(engine: Engine, postgres_url: str) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("CREATE DATABASE fresh"))
    url = make_url(postgres_url).set(database="fresh").render_as_string(hide_password=False)
    script = "import sys; from db.engine import connect, migrate; migrate(connect(sys.argv[1]))"
    processes = [subprocess.Popen([sys.executable, "-c", script, url]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    fresh = connect(url)
    with fresh.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == ["0002"]
    migrate(fresh)
    fresh.dispose()


class TestAddress:
    def test_data_lives_where_the_environment_says(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("BITFRONTIER_DATA", str(tmp_path / "data"))
        assert data_directory() == (tmp_path / "data").resolve()

    def test_data_lives_in_the_system_folder_for_root_else_in_the_users(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.delenv("BITFRONTIER_DATA", raising=False)
        monkeypatch.delenv("XDG_DATA_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        assert data_directory() == Path("/var/lib/bitfrontier")
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert data_directory() == tmp_path / ".local" / "share" / "bitfrontier"

    def test_the_url_of_the_environment_wins(self, monkeypatch: pytest.MonkeyPatch, postgres_url: str) -> None:
        monkeypatch.setenv("BITFRONTIER_DATABASE_URL", postgres_url)
        assert database_url() == make_url(postgres_url)
        connect().dispose()

    @pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg"])
    def test_every_spelling_of_postgres_works(self, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
        monkeypatch.setenv("BITFRONTIER_DATABASE_URL", f"{scheme}://me:secret@host/name")
        assert database_url().drivername == "postgresql+psycopg"

    @pytest.mark.parametrize("url", ["sqlite:///file.db", "no url at all"])
    def test_other_databases_are_refused(self, url: str) -> None:
        with pytest.raises(DatabaseUnavailable):
            connect(url)

    def test_a_server_that_is_not_there_is_reported_without_the_password(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(db.engine, "PATIENCE_SECONDS", 0.5)
        with pytest.raises(DatabaseUnavailable, match="no answer") as refusal:
            connect("postgresql://me:secret@127.0.0.1:1/name")
        assert "secret" not in refusal.value.detail
        assert refusal.value.problem()["status"] == 503


@pytest.mark.parametrize(
    ("value", "stored"), [("\\u0000", '"\\\\u0000"'), ({"a": [None, 1.5]}, '{"a": [null, 1.5]}')], ids=repr
)
def test_json_that_only_looks_wrong_is_stored(value: object, stored: str) -> None:
    assert to_json(value) == stored


class TestEmbedded:
    @pytest.fixture
    def folder(self, monkeypatch: pytest.MonkeyPatch, data_folder: Path) -> Iterator[Path]:
        """Where the embedded server will live; at the first test the folder and its parents do not exist yet."""
        monkeypatch.delenv("BITFRONTIER_DATABASE_URL", raising=False)
        monkeypatch.setenv("BITFRONTIER_DATA", str(data_folder / "not" / "there"))
        folder = data_folder / "not" / "there" / "postgres"
        yield folder
        embedded.leave(folder)

    def test_a_killed_server_comes_back_with_its_rows(self, folder: Path) -> None:
        engine = connect()
        migrate(engine)
        search, _ = create_search(engine, request_for())
        os.kill(postmaster(folder), signal.SIGKILL)
        again = connect()
        assert get_search(again, search.id) == search
        os.kill(postmaster(folder), signal.SIGKILL)
        assert patiently(lambda: get_search(engine, search.id)) == search, "an engine revives its server by itself"
        again.dispose()
        engine.dispose()

    def test_many_threads_that_find_it_dead_start_one(self, folder: Path) -> None:
        connect().dispose()
        os.kill(postmaster(folder), signal.SIGKILL)
        failures: list[Exception] = []

        def enter() -> None:
            try:
                connect().dispose()
            except DatabaseUnavailable as failure:
                failures.append(failure)

        threads = [threading.Thread(target=enter) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []

    def test_a_stranger_with_the_number_of_the_server_is_no_server(self, folder: Path) -> None:
        connect().dispose()
        lines = (folder / "postmaster.pid").read_text().splitlines(keepends=True)
        embedded.leave(folder)
        (folder / "postmaster.pid").write_text("".join([f"{os.getpid()}\n", *lines[1:]]))
        connect().dispose()
        assert postmaster(folder) != os.getpid()

    def test_it_stops_when_the_last_process_leaves(self, folder: Path) -> None:
        api, worker = Process(), Process()
        server = postmaster(folder)
        api.leave()
        assert psutil.pid_exists(server)
        worker.leave()
        assert not is_running(server)

    def test_a_killed_process_does_not_keep_it_running(self, folder: Path) -> None:
        api, worker = Process(), Process()
        server = postmaster(folder)
        worker.kill()
        assert is_running(server)
        api.leave()
        assert not is_running(server)

    def test_a_server_that_another_process_revived_is_stopped_too(self, folder: Path) -> None:
        api, worker = Process(), Process()
        os.kill(postmaster(folder), signal.SIGKILL)
        late = Process()
        server = postmaster(folder)
        late.leave()
        api.leave()
        assert is_running(server)
        worker.leave()
        assert not is_running(server)

    def test_white_space_in_the_path_is_refused(self, monkeypatch: pytest.MonkeyPatch, data_folder: Path) -> None:
        monkeypatch.delenv("BITFRONTIER_DATABASE_URL", raising=False)
        monkeypatch.setenv("BITFRONTIER_DATA", str(data_folder / "my data"))
        with pytest.raises(DatabaseUnavailable, match="white space"):
            connect()

    def test_a_folder_that_cannot_be_made_is_reported(self, monkeypatch: pytest.MonkeyPatch, data_folder: Path) -> None:
        monkeypatch.delenv("BITFRONTIER_DATABASE_URL", raising=False)
        (data_folder / "file").touch()
        monkeypatch.setenv("BITFRONTIER_DATA", str(data_folder / "file"))
        with pytest.raises(DatabaseUnavailable, match="file"):
            connect()


class Process:
    """Another process that has connected, and stays until told to leave."""

    SCRIPT = "import sys; from db.engine import connect; connect(); print('in', flush=True); sys.stdin.read()"

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "in\n"

    def leave(self) -> None:
        self.process.communicate(timeout=30)
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)


def postmaster(folder: Path) -> int:
    return int((folder / "postmaster.pid").read_text().splitlines()[0])


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)


def patiently(read: Callable[[], Search]) -> Search:
    """The value of `read`, tried for ten seconds: a server that recovers refuses connections meanwhile."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return read()
        except (OperationalError, DatabaseUnavailable):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
