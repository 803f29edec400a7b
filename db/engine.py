"""The connection to Postgres: a server of your own by URL, or the embedded one; and the migrations."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import psycopg
from alembic import command
from alembic.config import Config
from sqlalchemy import (
    URL,
    Engine,
    ExceptionContext,
    PoolProxiedConnection,
    QueuePool,
    create_engine,
    event,
    func,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from db import embedded
from db.errors import DatabaseUnavailable
from search.errors import InvalidRequest

DATA_VARIABLE = "BITFRONTIER_DATA"
URL_VARIABLE = "BITFRONTIER_DATABASE_URL"
CONNECTIONS_VARIABLE = "BITFRONTIER_DATABASE_CONNECTIONS"

CONNECTIONS = 20
POOL_SECONDS = 5.0
"""How long a query waits for one of the connections."""

READ_ONLY = "25006"

IDLE_SECONDS = 10.0
"""How long a transaction may do nothing: whoever hangs in the middle of one must not keep what it has locked."""

# A host that is gone answers nothing: it must be noticed in seconds, not in the kernel's quarter of an hour.
NETWORK = {
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}

# A server that was just started, killed or restarted refuses connections for seconds.
PATIENCE_SECONDS = 10.0
RETRY_SECONDS = 0.2

MIGRATION_LOCK = 0x62_69_74_66  # "bitf": any number that no other program on this database locks

_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def data_directory() -> Path:
    """Where this service keeps its data: `BITFRONTIER_DATA`, else /var/lib/bitfrontier for root, else the user's own
    data folder. It need not exist yet."""
    given = os.environ.get(DATA_VARIABLE)
    if given:
        return Path(given).expanduser().resolve()
    if os.geteuid() == 0:
        return Path("/var/lib/bitfrontier")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "bitfrontier"


def database_url() -> URL:
    """The address in `BITFRONTIER_DATABASE_URL`, else that of the embedded Postgres, which is started.

    Raises DatabaseUnavailable when the address is not one of Postgres, or the embedded server does not start.
    """
    given = os.environ.get(URL_VARIABLE)
    return _parsed(given) if given else embedded.start(_embedded_folder())


def connect(
    url: str | None = None,
    *,
    statement_timeout: float | None = None,
    idle_timeout: float = IDLE_SECONDS,
    application_name: str = "bitfrontier",
) -> Engine:
    """An engine whose database answers: at `url`, else at `BITFRONTIER_DATABASE_URL`, else embedded.

    A statement that takes longer than `statement_timeout` seconds is ended; a transaction that does nothing for
    `idle_timeout` seconds is, with its connection. An engine on the embedded server starts it again when it has died.
    At most `BITFRONTIER_DATABASE_CONNECTIONS` connections (20) are open at once; who waits five seconds for one, gets
    DatabaseUnavailable. So does who calls this, after about ten seconds without an answer.
    """
    limits = {"idle_in_transaction_session_timeout": idle_timeout, "statement_timeout": statement_timeout or 0}
    url = url or os.environ.get(URL_VARIABLE)
    engine = _engine(_parsed(url), limits, application_name) if url else _embedded_engine(limits, application_name)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with engine.connect():
                return engine
        except (OperationalError, DatabaseUnavailable) as error:
            if time.monotonic() > deadline:
                engine.dispose()
                reason = error.orig if isinstance(error, OperationalError) else error
                raise DatabaseUnavailable(
                    f"no answer from {engine.url.render_as_string()} in {PATIENCE_SECONDS:g} s: {str(reason).strip()}"
                ) from error
            time.sleep(RETRY_SECONDS)


def migrate(engine: Engine) -> None:
    """Bring the schema up to date, all or nothing; processes that start together wait for one another."""
    config = Config()
    config.set_main_option("script_location", "db:migrations")
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL statement_timeout = 0"))  # others may be at it for long
        connection.execute(select(func.pg_advisory_xact_lock(MIGRATION_LOCK)))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def to_json(value: Any) -> str:
    """`value` as the JSON that Postgres stores.

    Raises ValueError for NaN, infinities and NUL characters, which have no place in it.
    """
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"JSON has neither NaN nor Infinity; store null instead: {error}") from error
    if _NUL.search(text):
        raise ValueError("JSON in Postgres cannot hold the NUL character")
    return text


def _parsed(text: str) -> URL:
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise DatabaseUnavailable("the database URL cannot be read", accepted="postgresql://user@host/name") from error
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise DatabaseUnavailable(f"'{url.get_backend_name()}' is not supported; the database must be Postgres")
    return url.set(drivername="postgresql+psycopg")


class _Pool(QueuePool):
    def connect(self) -> PoolProxiedConnection:
        try:
            return super().connect()
        except PoolTimeout as error:
            raise DatabaseUnavailable(
                f"all {self.size()} connections to the database are in use; {CONNECTIONS_VARIABLE} allows more"
            ) from error
        except psycopg.ProgrammingError as error:
            # SQLAlchemy's ping sets a mode of the connection back, which cannot be when Ctrl-C ended the ping.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise


def _engine(url: URL, limits: dict[str, float], application_name: str) -> Engine:
    given = url.normalized_query.get("options", ())
    options = [*given, *(f"-c {name}={round(1000 * seconds)}" for name, seconds in limits.items() if seconds)]
    arguments = NETWORK | {"application_name": application_name}
    missing = {name: value for name, value in arguments.items() if name not in url.query}
    engine = create_engine(
        url,
        poolclass=_Pool,
        pool_size=connections(),
        max_overflow=0,
        pool_timeout=POOL_SECONDS,
        pool_pre_ping=True,
        connect_args=missing | {"options": " ".join(options)},
        json_serializer=to_json,
        # Requests and digests of keys: an error that is logged must not repeat them.
        hide_parameters=True,
    )

    @event.listens_for(engine, "handle_error")
    def leave_a_server_that_only_reads(context: ExceptionContext) -> None:
        # After a switch to another server the old one may still answer: what is connected to it never writes again.
        if getattr(context.original_exception, "sqlstate", None) == READ_ONLY:
            context.is_disconnect = True

    return engine


def connections() -> int:
    """How many connections an engine has at most. Raises InvalidRequest for a setting that is no such number."""
    given = os.environ.get(CONNECTIONS_VARIABLE, str(CONNECTIONS))
    if not given.isdecimal() or int(given) < 1:
        raise InvalidRequest(
            f"{CONNECTIONS_VARIABLE} is '{given}'; it must be a whole number from 1",
            field=CONNECTIONS_VARIABLE,
            value=given,
            accepted="a whole number from 1",
        )
    return int(given)


def _embedded_folder() -> Path:
    return data_directory() / "postgres"


def _embedded_engine(limits: dict[str, float], application_name: str) -> Engine:
    folder = _embedded_folder()
    engine = _engine(embedded.start(folder), limits, application_name)

    @event.listens_for(engine, "do_connect")
    def start_again(dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:
        try:
            return dialect.connect(*arguments, **options)
        except dialect.loaded_dbapi.OperationalError:
            embedded.start(folder)
            return dialect.connect(*arguments, **options)

    return engine
