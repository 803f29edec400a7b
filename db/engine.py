"""The connection to Postgres: a server of your own by URL, or the embedded one; and the migrations."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import URL, Engine, create_engine, event, func, make_url, select
from sqlalchemy.exc import ArgumentError, OperationalError

from db import embedded
from db.errors import DatabaseUnavailable

DATA_VARIABLE = "BITFRONTIER_DATA"
URL_VARIABLE = "BITFRONTIER_DATABASE_URL"

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


def connect(url: str | None = None) -> Engine:
    """An engine whose database answers: at `url`, else at `BITFRONTIER_DATABASE_URL`, else embedded.

    An engine on the embedded server starts it again when it has died. Raises DatabaseUnavailable after about ten
    seconds without an answer.
    """
    url = url or os.environ.get(URL_VARIABLE)
    engine = _engine(_parsed(url)) if url else _embedded_engine()
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


def _engine(url: URL) -> Engine:
    return create_engine(url, pool_pre_ping=True, json_serializer=to_json)


def _embedded_folder() -> Path:
    return data_directory() / "postgres"


def _embedded_engine() -> Engine:
    folder = _embedded_folder()
    engine = _engine(embedded.start(folder))

    @event.listens_for(engine, "do_connect")
    def start_again(dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:
        try:
            return dialect.connect(*arguments, **options)
        except dialect.loaded_dbapi.OperationalError:
            embedded.start(folder)
            return dialect.connect(*arguments, **options)

    return engine
