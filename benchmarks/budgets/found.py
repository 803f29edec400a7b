"""What a study has found at a seed, kept beside the reports: the runs of a report may be of different days."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.budgets.studies import Study
from benchmarks.report import RESULTS, device

FOLDER = RESULTS / "budgets"

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Tried:
    """A configuration that refinement measured: mean bits of a code, loss on the calibration split, and what was
    expected before, as mean and standard deviation of its logarithm."""

    bits: float
    loss: float
    expected: tuple[float, float] | None


@dataclass
class Found:
    """What came out: method → budget (mean bits of a code) → the losses of the held-out samples, and the scheme of
    every unit (its place in the study's); the seconds of each method; what refinement tried; what the frontier's
    metric predicted; when and on what it was measured."""

    study: Study
    seed: int
    losses: dict[str, dict[float, Floats]] = field(default_factory=dict)
    choices: dict[str, dict[float, list[int]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    evaluations: float = 0.0
    trials: list[Tried] = field(default_factory=list)
    predicted: dict[float, float] = field(default_factory=dict)
    day: str = field(default_factory=lambda: datetime.now(tz=UTC).date().isoformat())
    machine: str = field(default_factory=device)

    def save(self) -> None:
        """Keep it. What the same study found at this seed before is replaced."""
        losses = {
            method: {budget: values.tolist() for budget, values in of.items()} for method, of in self.losses.items()
        }
        kept = {"study": _terms(self.study), "day": self.day, "machine": self.machine, "losses": losses}
        kept |= {"choices": self.choices, "seconds": self.seconds, "evaluations": self.evaluations}
        kept |= {"predicted": self.predicted}
        kept |= {"trials": [asdict(tried) for tried in self.trials]}
        FOLDER.mkdir(parents=True, exist_ok=True)
        _file(self.study, self.seed).write_text(json.dumps(kept))


def load(study: Study, seed: int) -> Found | None:
    """What is kept of a study at a seed; None when it was of other schemes, data or evaluations."""
    file = _file(study, seed)
    kept = json.loads(file.read_text()) if file.exists() else None
    if not kept or kept["study"] != _terms(study):
        return None
    losses = {
        method: {float(budget): np.array(values) for budget, values in of.items()}
        for method, of in kept["losses"].items()
    }
    choices = {method: {float(budget): units for budget, units in of.items()} for method, of in kept["choices"].items()}
    trials = [
        Tried(one["bits"], one["loss"], tuple(one["expected"]) if one["expected"] else None) for one in kept["trials"]
    ]
    predicted = {float(budget): value for budget, value in kept["predicted"].items()}
    same = {name: kept[name] for name in ("seconds", "evaluations", "day", "machine")}
    return Found(study, seed, losses, choices, trials=trials, predicted=predicted, **same)


def _file(study: Study, seed: int) -> Path:
    return FOLDER / f"{study.name}-{seed}.json"


def _terms(study: Study) -> dict[str, Any]:
    """What the findings depend on, as far as it is stated."""
    return {
        "data": study.data,
        "schemes": list(study.schemes),
        "ignore": list(study.ignore),
        "channels": study.channels,
        "evaluations": study.evaluations,
    }
