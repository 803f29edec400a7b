"""A search's progress on standard error: a bar per stage on a terminal, else plain lines now and then."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from api.client import Event, NoticeEvent, ProgressEvent, StageEndEvent, StageEvent, StateEvent
from api.metrics import announcement, rough_time

LINE_SECONDS = 10.0
"""Between two plain lines of a stage that goes on."""
OPEN_ENDED = frozenset({"refine", "evolve"})
"""Stages that may end before they have done all that they might."""


@dataclass(slots=True)
class Step:
    """A stage; in the sensitivity stage, a metric. Times are the service's, so that they are right however late one
    listens."""

    stage: str
    title: str
    began: datetime
    last: datetime
    done: int = 0
    total: int = 0
    ended: bool = False
    seconds: float | None = None
    """What it took, once that is known."""
    reused: bool = False
    """Whether all of it was there already."""

    @property
    def rate(self) -> float | None:
        """Steps a second so far."""
        seconds = (self.last - self.began).total_seconds()
        return self.done / seconds if self.done and seconds > 0 else None

    @property
    def count(self) -> str:
        """How far it is."""
        if not self.total:
            return "reused" if self.reused else "done" if self.ended else ""
        return f"{self.done} of {self.total}"

    @property
    def speed(self) -> str:
        """Its rate and the time left; of one that has ended, what it took."""
        if self.ended:
            return f"in {rough_time(self.seconds)}" if self.seconds and self.seconds >= 1 and not self.reused else ""
        if self.rate is None:
            return ""
        left = rough_time((self.total - self.done) / self.rate)
        pace = f"{self.rate:.1f}/s" if self.rate >= 1 else f"{rough_time(1 / self.rate)} each"
        return f"{pace}, {left} left"

    def end(self, told: StageEndEvent | None = None) -> None:
        """Say that it has ended, and what is told of that."""
        self.ended = True
        if self.stage not in OPEN_ENDED:
            self.done = self.total
        if told is not None:
            self.seconds, self.reused = told.seconds, not self.total and bool(told.reused)


class Shown(Protocol):
    """Where steps are shown."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def begin(self, step: Step) -> None:
        """A step begins."""

    def update(self, step: Step) -> None:
        """A step went on, or has ended."""

    def clear(self) -> None:
        """A new attempt counts from the start."""

    def say(self, message: str) -> None:
        """Something else is to be known."""


def show(events: Iterable[Event], shown: Shown) -> None:
    """Show the progress that events tell of, until there are no more."""
    step: Step | None = None

    def end(told: StageEndEvent | None = None) -> None:
        if step is not None and not step.ended:
            step.end(told)
            shown.update(step)

    with shown:
        for event in events:
            if isinstance(event, StageEvent):
                end()
                title = announcement(event.model_dump(exclude_none=True)) or event.stage
                step = Step(event.stage, title, event.at, event.at, total=event.total)
                shown.begin(step)
            elif isinstance(event, ProgressEvent):
                if step is None or step.stage != event.stage:
                    end()
                    step = Step(event.stage, event.stage, event.at, event.at)
                    shown.begin(step)
                step.done, step.total, step.last = event.done, event.total, event.at
                shown.update(step)
            elif isinstance(event, StageEndEvent) and step is not None and event.stage == step.stage:
                end(event)
            elif isinstance(event, NoticeEvent):
                shown.say(event.message)
            elif isinstance(event, StateEvent) and event.state == "running":
                step = None
                shown.clear()
            elif isinstance(event, StateEvent) and event.state == "succeeded":
                end()


class Bars:
    """A bar per step."""

    def __init__(self, console: Console) -> None:
        columns = (
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(24),
            TextColumn("{task.fields[count]}", justify="right"),
            TextColumn("[dim]{task.fields[speed]}[/]"),
        )
        self._bars = Progress(*columns, console=console)
        self._last: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, step: Step) -> None:
        """A new bar."""
        self._last = self._bars.add_task(escape(step.title), total=None, count="", speed="")
        self.update(step)

    def update(self, step: Step) -> None:
        """Move the last bar."""
        if self._last is not None:
            # The bar of what has ended is full; without a number of steps, that of what goes on is in motion.
            total, done = (1, 1) if step.ended else (step.total or None, step.done)
            self._bars.update(self._last, total=total, completed=done, count=step.count, speed=step.speed)

    def clear(self) -> None:
        """Take all bars away."""
        for task in self._bars.task_ids:
            self._bars.remove_task(task)
        self._last = None

    def say(self, message: str) -> None:
        """A line above the bars."""
        self._bars.console.print(f"[yellow]{escape(message)}[/]")


class Lines:
    """A line when a step has ended, and now and then while it goes on."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def begin(self, step: Step) -> None:
        """Nothing yet."""

    def update(self, step: Step) -> None:
        """A line, if it is time for one."""
        if step.ended or time.monotonic() > self._printed + LINE_SECONDS:
            self._printed = time.monotonic()
            told = ", ".join(filter(None, (step.count, step.speed)))
            self._console.print(escape(f"{step.title}: {told or 'begun'}"))

    def clear(self) -> None:
        """What was printed stays."""

    def say(self, message: str) -> None:
        """A line."""
        self._console.print(escape(message))


class Nothing(Lines):
    """Shows nothing."""

    def update(self, step: Step) -> None:
        """Nothing."""

    def say(self, message: str) -> None:
        """Nothing."""


def shown_on(console: Console, *, quiet: bool) -> Shown:
    """Bars on a terminal; elsewhere lines or, if `quiet`, nothing."""
    if console.is_terminal:
        return Bars(console)
    return Nothing(console) if quiet else Lines(console)
