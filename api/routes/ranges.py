"""Within what the budgets of a search can mean anything."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from api.dependencies import CurrentAdmission, CurrentAsker, Database
from api.problems import BODY, responses
from api.strict import StrictRoute
from search.budget import BUDGETS
from search.feasibility import Range
from search.request import CostRequest

router = APIRouter(prefix="/v1", tags=["searches"], route_class=StrictRoute)


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class RangeDocument(_Document):
    """What configurations cost in one resource, in the unit of its budget."""

    unit: str = Field(examples=["bits per searched weight"])
    least: float = Field(examples=[4.25])
    """The smallest feasible budget."""
    most: float = Field(examples=[8.25])
    """A budget of this or more bounds nothing."""
    uniform: dict[str, float] = Field(examples=[{"w4a16g64": 4.25, "w8a16g64": 8.25}])
    """What it costs to give every unit that is not pinned the same scheme, by scheme."""

    @classmethod
    def of(cls, budget: str, range: Range) -> RangeDocument:
        """The document of the range of a budget."""
        return cls(unit=BUDGETS[budget].unit, least=range.least, most=range.most, uniform=range.uniform)


class Ranges(_Document):
    """What each budget can be."""

    ranges: dict[str, RangeDocument] | None
    """Budget → range; `latency_ms` where the request names a device. Null where no worker has inspected the model yet,
    or only for searches of other keys: then its layers are not known."""


@router.post("/ranges", responses=responses(*BODY), summary="Feasible ranges of budgets")
async def feasible(request: CostRequest, engine: Database, asker: CurrentAsker, admission: CurrentAdmission) -> Ranges:
    """What configurations of a model cost at least and at most, so that a budget can be chosen. Nothing is stored.

    An unknown model and an impossible space are refused as a search of them is; so is a space that is too fine to be
    looked into at once (`accepted` has the most entries), which may be searched all the same.
    """
    found = await admission.ranges(engine, request, asker)
    return Ranges(ranges=found and {name: RangeDocument.of(name, range) for name, range in found.items()})
