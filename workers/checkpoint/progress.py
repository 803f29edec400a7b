"""How far the writing of a checkpoint is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 5.0
"""Between two lines, where there is no terminal."""


@dataclass(slots=True)
class Bar:
    """Counts layers; rate and time left are those of the bytes that are read. Goes to standard error."""

    layers: int
    nbytes: int
    _console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False, soft_wrap=True))
    _progress: Progress | None = None
    _task: TaskID | None = None
    _done: int = 0
    _read: int = 0
    _began: float = field(default_factory=time.monotonic)
    _said: float = field(default_factory=time.monotonic)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            columns = (BarColumn(24), TextColumn("{task.description}"), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("", total=self.nbytes)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        elif error is None:
            self._say()

    def advance(self, nbytes: int, *, layer: bool) -> None:
        """So many more bytes of the source are done, a quantized layer's or others."""
        self._done += layer
        self._read += nbytes
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._read, description=self._text)
        elif time.monotonic() - self._said >= LINE_SECONDS:
            self._say()

    @property
    def _rate(self) -> float:
        return self._read / max(time.monotonic() - self._began, 1e-9)

    @property
    def _text(self) -> str:
        return f"quantized {self._done} of {self.layers} layers, {self._rate / 1e6:.0f} MB/s"

    def _say(self) -> None:
        self._said = time.monotonic()
        left = (self.nbytes - self._read) / self._rate if self._read else 0.0
        self._console.print(f"{self._text}, {left:.0f} s left")
