"""The JSON documents the interface answers with. A client has the same, so nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field

from db.states import State
from search.budget import BUDGETS

if TYPE_CHECKING:
    from api.frontier import Frontier
    from db.searches import Search
    from search.candidate import Candidate

FINISHED = frozenset({"succeeded", "failed", "cancelled"})


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class FieldError(BaseModel):
    """One of several errors of a request."""

    detail: str
    field: str | None = None
    value: Any = None
    accepted: Any = None


class Problem(BaseModel):
    """A problem document (RFC 9457)."""

    model_config = ConfigDict(
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:bitfrontier:problem:infeasible-budget",
                    "title": "No allocation fits the budget",
                    "status": 422,
                    "detail": "avg_bits = 3 is below what this space can reach; the smallest feasible value is 4.25",
                    "field": "budgets.avg_bits",
                    "value": 3,
                    "accepted": {"minimum": 4.25},
                    "request_id": "5f0c6b1c7ad14a0c8c9f0c7d7c1f4f5e",
                }
            ]
        },
    )

    type: str
    """A URN that names the kind of problem."""
    title: str
    """The kind of problem in words; the same for every problem of a type."""
    status: int = Field(ge=400, le=599)
    """The HTTP status."""
    detail: str
    """What is wrong here, in words."""
    field: str | None = None
    """Path of the field that is wrong, for example `budgets.avg_bits`."""
    value: Any = None
    """The value that was not accepted."""
    accepted: Any = None
    """What is accepted instead."""
    errors: list[FieldError] | None = None
    """Each of several errors, when there is more than one."""
    request_id: str | None = None
    """Names this request in the service's log; the header `X-Request-Id` of every answer."""


class Progress(_Document):
    """How far the present stage is."""

    done: int = Field(examples=[12])
    total: int = Field(examples=[64])


class Work(_Document):
    """What a search computed, and what it found already stored. What an attempt before this one stored counts as
    computed."""

    computed: int = Field(examples=[21])
    reused: int = Field(examples=[3])
    """Results that other searches had computed."""
    reused_from: list[int] = Field(examples=[[1]])
    """The searches that computed most of them; left out are those that the asker may not see."""

    @classmethod
    def of(cls, search: Search, *, of_all: bool) -> Work | None:
        """What the summary knows of it; `of_all`: whether other keys' searches may be named."""
        told = search.summary or {}
        if "computed" not in told or "reused" not in told:
            return None
        return cls(
            computed=told["computed"], reused=told["reused"], reused_from=told.get("reused_from", []) if of_all else []
        )


class SearchSummary(_Document):
    """A search as it stands, as lists have it."""

    id: int = Field(examples=[1])
    state: State
    stage: str | None = Field(examples=["measure"])
    """`profile`, `sensitivity`, `baselines`, `optimize`, `measure`, `refine` or `evolve`, `accept`; null before a
    worker has begun."""
    progress: Progress
    model: str = Field(examples=["all-minilm-l6-v2"])
    target: str = Field(examples=["vllm"])
    budgets: dict[str, float] = Field(examples=[{"avg_bits": 5.25}])
    error: Problem | None = None
    """Why the search failed; while it is queued or running, what ended the attempt before."""
    work: Work | None
    """Null until the first results are there."""
    cancel_requested: bool
    attempt: int
    """How often a worker has begun it. Above 1, it was resumed after a worker stopped; nothing measured was lost."""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    links: dict[str, str]
    """`self`, `events`, `frontier`, `sensitivities` and `page`."""

    @classmethod
    def of(cls, search: Search, *, of_all: bool = True, **more: Any) -> Self:
        """The document of a row, for someone who may see the searches of all keys, or not."""
        resource = f"/v1/searches/{search.id}"
        budgets = search.request["budgets"]
        return cls(
            id=search.id,
            state=search.state,
            stage=search.stage,
            progress=Progress(done=search.done, total=search.total),
            model=search.model,
            target=search.target,
            budgets={name: budgets[name] for name in BUDGETS if budgets.get(name) is not None},
            error=Problem.model_validate(search.error) if search.error else None,
            work=Work.of(search, of_all=of_all),
            cancel_requested=search.cancel_requested,
            attempt=search.attempt,
            created_at=search.created_at,
            started_at=search.started_at,
            finished_at=search.finished_at,
            links={
                "self": resource,
                "events": f"{resource}/events",
                "frontier": f"{resource}/frontier",
                "sensitivities": f"{resource}/sensitivities",
                "page": f"/searches/{search.id}",
            },
            **more,
        )


class SearchDocument(SearchSummary):
    """A search as it stands, with all that was asked for and is known."""

    request: dict[str, Any]
    """The request with every default filled in."""
    summary: dict[str, Any] | None = None
    """What is known of the model and the run; grows while the search runs."""

    @classmethod
    def of(cls, search: Search, *, of_all: bool = True, **more: Any) -> Self:
        """The document of a row that was read whole."""
        return super().of(search, of_all=of_all, request=search.request, summary=_told(search), **more)


def _told(search: Search) -> dict[str, Any] | None:
    """The summary without what `work` says."""
    return {name: value for name, value in search.summary.items() if name != "reused_from"} if search.summary else None


class SearchPage(_Document):
    """Searches, newest first."""

    searches: list[SearchSummary]
    next_cursor: int | None
    """Pass as `cursor` for the next page; null on the last."""


class Point(_Document):
    """A configuration of a search."""

    number: int
    source: str
    """`uniform`: every layer alike; `ilp`, `refined`, `evolved`: who proposed it."""
    label: str
    on_frontier: bool
    """Whether it fits and no other fitting configuration is both cheaper and better."""
    fits: bool
    """Whether every budget holds."""
    costs: dict[str, float]
    """`size_bytes`, `avg_bits`, `bitops`, and `latency_us` where latency is counted."""
    metrics: dict[str, float]
    """Measured: `calibration_loss` on the data that was searched; `acceptance_loss` of those that were considered for
    the frontier; of those that are reported `loss` (with `loss_stderr`) on the held-out split and, where they exist,
    `perplexity` or `accuracy`. While the search runs, `loss` is the calibration loss. Empty: not measured."""
    predicted: dict[str, float]
    """Predicted loss by metric."""
    expected: dict[str, float]
    """What all measurements before its own let expect of the held-out loss (`loss`), and the ends `low` and `high` of a
    90 % interval, as wide as these and the documents of the calibration data leave it open."""
    shadow_prices: dict[str, float]
    """By how much the logarithm of the predicted loss falls for one more unit of each bounded resource (a byte, a bit,
    a bit operation), at the point's own costs: dx more save a share 1 − exp(−price·dx). Of the points of the frontier,
    once the search has ended."""
    allocation: dict[str, str] | None = None
    """Layer → scheme. Left out of the points that a frontier document has in `dominated` and `predicted`."""
    page: str
    """Permalink of the point."""

    @classmethod
    def of(cls, search_id: int, candidate: Candidate, allocation: dict[str, str] | None = None) -> Point:
        """The document of a candidate, with its allocation where that is given."""
        return cls(
            number=candidate.number,
            source=candidate.source,
            label=candidate.label,
            on_frontier=candidate.on_frontier,
            fits=candidate.fits,
            costs=candidate.costs,
            metrics=candidate.metrics,
            predicted=candidate.predicted,
            expected=candidate.expected,
            shadow_prices=candidate.shadow_prices,
            **({} if allocation is None else {"allocation": allocation}),
            page=f"/searches/{search_id}/points/{candidate.number}",
        )


class Reference(_Document):
    """What no allocation can do better, at totals of `axis` of at most each of `levels`."""

    axis: str
    levels: list[float]
    """In the units of `costs`."""
    lower_bound: list[float]
    """Below it no allocation within the budgets is predicted, by the predictions as the measurements corrected them."""
    rate_distortion: list[float] | None
    """What an ideal quantizer with its bits spread ideally would lose, whatever the other budgets; null where
    activations are rounded, or the axis does not count stored bits."""


class FrontierDocument(_Document):
    """The measured frontier, with further groups on demand."""

    search: int
    state: State
    axes: list[str]
    """Resources the frontier is drawn over."""
    budgets: dict[str, float]
    limits: dict[str, dict[str, float]]
    """Budgets on some of the layers: pattern → budgets by name."""
    full_precision: dict[str, float]
    """What the unquantized model measures."""
    objective: str
    """What `best` has least of: `loss`, or the name of a budget."""
    best: int | None
    """Number of the point that fits every budget and has least of the objective."""
    best_under: int | None = None
    """Number of the measured point of least loss that keeps the budgets in `under`."""
    knee: int | None
    """Number of the point at which the frontier bends most, over the main axis and the logarithm of the loss: before it
    a bit more cost saves much, after it little. Null where the frontier does not bend."""
    hypervolume: float | None
    """The mean of ln(loss of the worst uniform configuration ÷ loss of the frontier) over the main axis, from the least
    cost that is possible to the budget."""
    reference: Reference | None
    """Null before the search ends."""
    points: list[Point]
    baselines: list[Point] | None = None
    """Uniform configurations; those on the frontier are among `points` too."""
    dominated: list[Point] | None = None
    """Measured mixed configurations that are not on the frontier."""
    predicted: list[Point] | None = None
    """Configurations without a loss on the held-out split."""

    @classmethod
    def of(
        cls,
        frontier: Frontier,
        include: set[str],
        allocations: Mapping[int, dict[str, str]],
        under: Mapping[str, float] | None = None,
    ) -> FrontierDocument:
        """The document of a frontier with the named groups, what allocations are known by number, and the best point
        under other budgets."""
        search = frontier.search

        def documents(points: list[Candidate]) -> list[Point]:
            return [Point.of(search.id, point, allocations.get(point.number)) for point in points]

        groups = {name: documents(getattr(frontier, name)) for name in include}
        return cls(
            search=search.id,
            state=search.state,
            axes=frontier.axes,
            budgets=frontier.budgets,
            limits=frontier.limits,
            full_precision=frontier.full_precision,
            objective=frontier.objective,
            best=_number(frontier.best),
            **({"best_under": _number(frontier.best_under(under))} if under else {}),
            knee=_number(frontier.knee),
            hypervolume=frontier.hypervolume,
            reference=Reference.model_validate(frontier.reference) if frontier.reference else None,
            points=documents(frontier.points),
            **groups,
        )


def _number(candidate: Candidate | None) -> int | None:
    return candidate.number if candidate else None
