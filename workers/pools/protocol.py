"""What a pool of evaluators is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from search.errors import BitfrontierError
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.tasks import Item, Result

Function = Callable[[Evaluator, Item], Result]


class WorkersLost(BitfrontierError):
    """The processes that evaluate died again and again."""

    status = 503
    type = "workers-lost"
    title = "The evaluating processes died"


class TaskTimedOut(BitfrontierError):
    """An item, or loading the model, took longer than the time limit, twice."""

    status = 504
    type = "task-timed-out"
    title = "A task took longer than its time limit"


def nothing() -> None:
    """Checks nothing."""


def always() -> bool:
    """There is always more to do."""
    return True


class Pool(Protocol):
    """Evaluators of one spec. `map` gives each result as it comes; what a function raises, it raises."""

    spec: EvaluatorSpec
    on_wait: Callable[[str], None]
    """Hears, once a wait, why `map` waits for an evaluator."""

    def __len__(self) -> int:
        """How many evaluators the pool may use now: at least 1."""
        ...

    @property
    def held(self) -> int:
        """How many evaluators have been asked for and not let go of."""
        ...

    def prepare(self) -> None:
        """Begin to build evaluators, without waiting for them."""
        ...

    def map(
        self,
        function: Function,
        items: Sequence[Item],
        check: Callable[[], None] = nothing,
        more: Callable[[], bool] = always,
    ) -> Iterator[tuple[int, Result]]:
        """(index, result) of every item, in any order.

        `check` is called often, and raises to end the map: what is under way is stopped at once. Once `more` says False
        no further item is given out: the results of those under way still come. When a map is left early for another
        reason, what is under way ends unheard.
        """
        ...

    def close(self) -> None:
        """Let the evaluators go; the next map builds others."""
        ...
