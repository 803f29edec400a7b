from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Engine, make_url, text
from sqlalchemy.exc import OperationalError

import db.engine
from db import embedded
from db.engine import connect, data_directory, database_url, migrate, to_json
from db.errors import DatabaseUnavailable
from db.events import events_after
from db.results import Stored, get_results
from db.searches import Search, create_search, get_search
from db.tables import Base
from search.errors import InvalidRequest
from search.request import SearchRequest
from tests.aside import PATIENCE, aside, results, wait_until
from tests.db.conftest import postmaster, request_for

pytestmark = pytest.mark.long


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
    assert [process.wait(PATIENCE) for process in processes] == [0, 0, 0]
    fresh = connect(url)
    with fresh.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == ["0003"]
    migrate(fresh)
    fresh.dispose()


def test_an_upgrade_keeps_what_the_release_before_stored(postgres_url: str) -> None:
    old = connect(make_url(postgres_url).set(database="postgres").render_as_string(hide_password=False))
    with old.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("CREATE DATABASE old"))
    old.dispose()
    old = connect(make_url(postgres_url).set(database="old").render_as_string(hide_password=False))
    config = Config()
    config.set_main_option("script_location", "db:migrations")
    with old.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        connection.execute(
            text(
                "INSERT INTO searches (request, model, target, idempotency_key, body_digest)"
                " VALUES (:request, 'minilm', 'generic', 'k', :digest)"
            ),
            {"request": json.dumps(request_for().model_dump(mode="json")), "digest": digest_of(request_for())},
        )
        connection.execute(text("INSERT INTO events (search_id, kind, data) VALUES (1, 'state', '{}'), (1, 'x', '{}')"))
        connection.execute(text("INSERT INTO results (key, kind, value, seconds) VALUES ('r', 'probe', '7', 1)"))
    migrate(old)
    assert create_search(old, request_for(), idempotency_key="k") == (get_search(old, 1), False)
    assert len(events_after(old, 1, 0)) == 2
    assert get_results(old, ["r"]) == {"r": Stored(7, None)}
    with old.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0002")
    migrate(old)
    assert get_search(old, 1).model == "minilm"
    old.dispose()


class TestConnections:
    def test_who_finds_all_in_use_is_told_in_seconds(self, monkeypatch: pytest.MonkeyPatch, postgres_url: str) -> None:
        monkeypatch.setenv("BITFRONTIER_DATABASE_CONNECTIONS", "1")
        monkeypatch.setattr(db.engine, "POOL_SECONDS", 0.2)
        engine = connect(postgres_url)
        with engine.connect(), pytest.raises(DatabaseUnavailable, match="all 1 connections"):
            engine.connect()
        engine.connect().close()
        engine.dispose()

    # One that comes while something is finalized is lost: Python's doing, and none of ours.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_ctrl_c_is_nothing_else_in_the_middle_of_a_look_at_the_database(
        self, postgres_url: str, request: pytest.FixtureRequest
    ) -> None:
        engine, chance, looking, caught = connect(postgres_url), random.Random(0), False, 0

        def ctrl_c(_number: int, _frame: object) -> None:
            if looking:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, ctrl_c)
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
        for _ in range(200):
            key = threading.Timer(chance.random() * 0.004, os.kill, (os.getpid(), signal.SIGINT))
            key.start()
            try:
                try:
                    looking = True
                    while key.is_alive():
                        engine.connect().close()
                finally:
                    looking = False
            except KeyboardInterrupt:
                caught += 1
        engine.dispose()
        assert caught > 100

    @pytest.mark.parametrize("given", ["0", "-1", "many", ""])
    def test_a_number_that_is_none_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, postgres_url: str, given: str
    ) -> None:
        monkeypatch.setenv("BITFRONTIER_DATABASE_CONNECTIONS", given)
        with pytest.raises(InvalidRequest, match="BITFRONTIER_DATABASE_CONNECTIONS"):
            connect(postgres_url)

    @pytest.mark.parametrize("options", [None, "-c search_path=public,optuna"])
    def test_a_statement_that_takes_too_long_is_ended(self, postgres_url: str, options: str | None) -> None:
        url = make_url(postgres_url).update_query_dict({"options": options} if options else {})
        address = url.render_as_string(hide_password=False)
        engine = connect(address, statement_timeout=0.2, application_name="slow")
        with engine.connect() as connection:
            assert connection.execute(text("SHOW application_name")).scalar() == "slow"
            assert connection.execute(text("SHOW search_path")).scalar() == (
                "public,optuna" if options else '"$user", public'
            )
            with pytest.raises(OperationalError, match="statement timeout"):
                connection.execute(text("SELECT pg_sleep(30)"))
        engine.dispose()


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

    def test_a_server_that_is_still_dying_is_not_taken_for_a_live_one(self, folder: Path) -> None:
        for _ in range(8):
            host = embedded.start(folder).query["host"]
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(f"{host}/.s.PGSQL.5432")
            os.kill(postmaster(folder), signal.SIGKILL)

    def test_a_server_that_takes_connections_and_answers_none_is_no_server(self, folder: Path) -> None:
        url = embedded.start(folder).render_as_string()
        # So is the moment between a signal 9 and the end, as long as it takes on a busy machine.
        psutil.Process(postmaster(folder)).suspend()
        started = aside(embedded.start, folder)
        time.sleep(0.5)
        assert not started.done()
        os.kill(postmaster(folder), signal.SIGKILL)
        started.result(PATIENCE)
        with connect(url).connect() as connection:
            assert connection.scalar(text("SELECT 1")) == 1

    def test_what_a_killed_server_leaves_running_is_waited_for(self, folder: Path) -> None:
        engine = connect()
        with engine.connect() as connection:
            child = psutil.Process(connection.scalar(text("SELECT pg_backend_pid()")))
            child.suspend()
            os.kill(postmaster(folder), signal.SIGKILL)
            started = aside(embedded.start, folder)
            wait_until(lambda: "still in use" in (folder / "log").read_text())
            assert not started.done()
            child.resume()
            started.result(PATIENCE)
            connection.invalidate()
        engine.dispose()

    def test_the_reason_is_the_servers_own(self, folder: Path) -> None:
        connect().dispose()
        embedded.leave(folder)
        settings = folder / "postgresql.conf"
        right = settings.read_text()
        settings.write_text("max_connections = none\n")
        with pytest.raises(DatabaseUnavailable, match="configuration file"):
            embedded.start(folder)
        settings.write_text(right)

    def test_many_threads_that_find_it_dead_start_one(self, folder: Path) -> None:
        connect().dispose()
        os.kill(postmaster(folder), signal.SIGKILL)
        results([aside(lambda: connect().dispose()) for _ in range(6)])

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
        self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)


def digest_of(request: SearchRequest) -> str:
    """As the release before stored it."""
    return hashlib.sha256(json.dumps(request.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)


def patiently(read: Callable[[], Search]) -> Search:
    """The value of `read`, tried for a while: a server that recovers refuses connections meanwhile."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return read()
        except (OperationalError, DatabaseUnavailable):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
