"""Evolutions as Optuna studies, in a Postgres schema of their own: Optuna brings an `alembic_version` table, as we do.

optuna-dashboard opens them at the address of the database with the schema as search path, which `dashboard_url` gives:

    optuna-dashboard "postgresql+psycopg://user:password@host/name?options=-csearch_path%3Doptuna"

The embedded server is reached through a socket: `…://postgres@/postgres?host=FOLDER&options=-csearch_path%3Doptuna`.
"""

from __future__ import annotations

from typing import Any

import optuna
from optuna.storages import RDBStorage
from sqlalchemy import URL, Connection, Engine, func, select
from sqlalchemy.schema import CreateSchema

from db.engine import MIGRATION_LOCK

SCHEMA = "optuna"


def study_storage(engine: Engine) -> RDBStorage:
    """Optuna's storage on the database of `engine`; its schema and tables are created when missing.

    Its connections are made by `engine`, so that they start an embedded server again as those do.
    """

    def connect() -> Any:
        connection = engine.raw_connection()
        connection.detach()
        connection.cursor().execute(f"SET search_path TO {SCHEMA}")
        connection.commit()
        return connection.dbapi_connection

    with engine.begin() as connection:
        _one_at_a_time(connection)
        connection.execute(CreateSchema(SCHEMA, if_not_exists=True))
    with engine.begin() as connection:
        _one_at_a_time(connection)
        # Optuna takes braces in an address for a template, and a password may have some.
        url = engine.url.set(password=None).render_as_string()
        return RDBStorage(url, engine_kwargs={"creator": connect, "pool_pre_ping": True})


def study_name(search_id: int) -> str:
    """The name of a search's study."""
    return f"search-{search_id}"


def delete_study(engine: Engine, search_id: int) -> None:
    """Delete the study of a search, where there is one."""
    storage = study_storage(engine)
    if study_name(search_id) in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name=study_name(search_id), storage=storage)


def dashboard_url(engine: Engine) -> URL:
    """The address for optuna-dashboard, with the password, if there is one."""
    return engine.url.update_query_dict({"options": f"-csearch_path={SCHEMA}"})


def _one_at_a_time(connection: Connection) -> None:
    """Processes that start together must not create the same tables."""
    connection.execute(select(func.pg_advisory_xact_lock(MIGRATION_LOCK)))
