"""Registered models: a name, where it is loaded from, and what it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine, Row, Select, select
from sqlalchemy.dialects.postgresql import insert

from db.tables import Json, ModelRow
from search.inventory import Inventory


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is known; `inventory` is None until a worker has inspected it."""

    name: str
    source: str
    inventory: Inventory | None
    created_at: datetime

    @property
    def added(self) -> bool:
        """Whether it was given its name here; else it is known because a search named it by its Hugging Face id."""
        return self.source != f"hub:{self.name}"


def put_model(engine: Engine, name: str, source: str, inventory: Inventory | None) -> None:
    """Register a model, or replace the source and inventory of a registered one."""
    values = {"source": source, "inventory": inventory.to_json() if inventory else None}
    row = insert(ModelRow).values(name=name, **values)
    with engine.begin() as connection:
        connection.execute(row.on_conflict_do_update(index_elements=[ModelRow.name], set_=values))


def get_model(engine: Engine, name: str) -> Model | None:
    """The model registered as `name`."""
    with engine.connect() as connection:
        row = connection.execute(_query().where(ModelRow.name == name)).first()
    return None if row is None else _model(row)


def list_models(engine: Engine) -> list[Model]:
    """All models that are known, by name."""
    with engine.connect() as connection:
        return [_model(row) for row in connection.execute(_query().order_by(ModelRow.name))]


def _query() -> Select[str, str, Json | None, datetime]:
    return select(ModelRow.name, ModelRow.source, ModelRow.inventory, ModelRow.created_at)


def _model(row: Row[str, str, Json | None, datetime]) -> Model:
    inventory = None if row.inventory is None else Inventory.from_json(row.inventory)
    return Model(row.name, row.source, inventory, row.created_at)
