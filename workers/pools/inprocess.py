"""The simplest pool: one evaluator in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from workers.evaluator import Evaluator, EvaluatorSpec
from workers.pools.protocol import Function, always, nothing
from workers.tasks import Item, Result


class InProcessPool:
    """One evaluator in this process, with all of torch's threads. `check` and `more` are asked between items only."""

    def __init__(self, spec: EvaluatorSpec) -> None:
        self.spec = spec
        self.on_wait: Callable[[str], None] = lambda _reason: None
        self._evaluator: Evaluator | None = None

    def __len__(self) -> int:
        return 1

    @property
    def held(self) -> int:
        """1 while the model is loaded."""
        return int(self._evaluator is not None)

    def prepare(self) -> None:
        """Load the model."""
        if self._evaluator is None:
            self._evaluator = Evaluator.build(self.spec)

    def map(
        self,
        function: Function,
        items: Sequence[Item],
        check: Callable[[], None] = nothing,
        more: Callable[[], bool] = always,
    ) -> Iterator[tuple[int, Result]]:
        """Run the items one after the other."""
        for index, item in enumerate(items):
            check()
            if not more():
                return
            self.prepare()
            assert self._evaluator is not None
            yield index, function(self._evaluator, item)

    def close(self) -> None:
        """Drop the model."""
        self._evaluator = None
