"""Moments and durations as they are written for people."""

from __future__ import annotations

from datetime import UTC, datetime


def moment(time: datetime | None) -> str:
    """A time in UTC, to the minute."""
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if time else "—"


def duration(start: datetime | None, end: datetime | None) -> str:
    """The time between two moments: `2 min 5 s`."""
    if start is None or end is None:
        return "—"
    seconds = round((end - start).total_seconds())
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (seconds, "s")]
    return " ".join(f"{amount} {unit}" for amount, unit in parts if amount) or "0 s"
