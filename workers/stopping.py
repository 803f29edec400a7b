"""What ends the work on a search before its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from search.sweep import Choice, Floats, Sweep


class Cancelled(Exception):
    """The person asked for the end of this search."""


class Shutdown(Exception):
    """This process was asked to stop."""


@dataclass(frozen=True)
class StoppableSweep(Sweep):
    """A sweep that asks before every program it solves whether to stop: thousands of them make a round."""

    pause: Callable[[], None] = lambda: None

    @classmethod
    def over(cls, sweep: Sweep, pause: Callable[[], None]) -> StoppableSweep:
        """The same sweep."""
        return cls(**{field.name: getattr(sweep, field.name) for field in fields(sweep)}, pause=pause)

    def frontier(self, loss: Floats, levels: Floats | None = None, *, prove: bool = False) -> list[Choice]:
        """`Sweep.frontier`, unless the search must stop."""
        self.pause()
        return super().frontier(loss, levels, prove=prove)
