"""What an export must know of a point of a search."""

from __future__ import annotations

from sqlalchemy import Engine

from db.models import get_model
from db.searches import Search
from search.candidate import Candidate
from search.errors import Conflict
from search.exports import Exported
from search.inventory import Inventory


def exported(engine: Engine, search: Search, point: Candidate) -> Exported:
    """`point` with all that an export must know. Raises Conflict when the model is no longer what was searched."""
    inventory = searched_inventory(engine, search)
    if inventory is None:
        raise Conflict(
            f"'{search.model}' is no longer registered as it was searched; register it again to export its points",
            field="model",
            value=search.model,
        )
    return Exported(search.model, inventory, search.target, search.request["space"]["quantizer"], point)


def searched_inventory(engine: Engine, search: Search) -> Inventory | None:
    """What the model of a search is made of; None where it is no longer registered as it was searched."""
    model = get_model(engine, search.model)
    inventory = model.inventory if model else None
    return inventory if inventory and inventory.digest == (search.summary or {}).get("model_digest") else None
