"""Dated result files."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch

RESULTS = Path(__file__).with_name("results")


def device() -> str:
    """What was measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def write(name: str, title: str, command: str, parts: list[str]) -> Path:
    """Write and print a report; its file is named by the day and `name`."""
    today = datetime.now(tz=UTC).date().isoformat()
    text = "\n\n".join([f"# {title}", f"{today}, {device()}. `{command}`", *parts]) + "\n"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{today}-{name}.md"
    path.write_text(text)
    print(text)
    return path


def table(rows: list[dict[str, object]]) -> str:
    """A Markdown table; numbers to three digits."""
    frame = pd.DataFrame(rows)
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns)]
    lines += [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "–" if pd.isna(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
