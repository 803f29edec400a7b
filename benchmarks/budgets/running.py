"""One study at one seed: tables, exact frontier, refinement, acceptance, and what everything loses on held-out data."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.budgets.found import Floats, Found, Tried
from benchmarks.budgets.studies import Study
from benchmarks.proxies.measuring import CACHE, fill, remembering
from benchmarks.rivals.rivals import BUDGETS, Name, allocate, calibration_inputs
from search.acceptance import accepted, finalists
from search.allocation import layer_schemes
from search.budget import TOLERANCE, Bound
from search.cost import cost_tables
from search.expansion import Expansion
from search.ladders import Ladders
from search.proposals import baselines
from search.refinement import Refinement, Trial
from search.space import Space
from search.surrogate import Features
from search.sweep import Choice, Sweep
from workers.calibration import Split, sample_count
from workers.evaluator import Evaluator
from workers.sensitivity.expansion import expansion
from workers.tasks import Item, Result, Task, content_key

METRIC = "fisher"


class Case:
    """An evaluator of a study at a seed that measures nothing twice, not even in another run."""

    def __init__(self, study: Study, seed: int) -> None:
        self.study, self.seed = study, seed
        self.evaluator: Evaluator = study.build(seed)
        self.space: Space = study.space(self.evaluator)
        self.sizes = list(map(sample_count, self.evaluator.batches("calibration")))
        self.cost = cost_tables(self.space, self.evaluator.inventory)["avg_bits"]
        self.uniform = list(baselines(self.space).values())
        # Scales cost the same whatever the codes.
        self.scales = self.cost.total(self.uniform[0]) - self.space.schemes[0].weight_bits
        levels = np.array(BUDGETS[::-1]) + self.scales
        self.sweep = Sweep(
            {"avg_bits": self.cost}, [Bound("avg_bits", "avg_bits", float(levels[0]))], "avg_bits", levels
        )
        self.spent: dict[str, float] = {}
        """Seconds by what they were spent on, of what was kept too."""
        self.seconds_now = 0.0
        """Seconds of what was not kept."""
        digest = content_key([self.evaluator.loaded.digest, self.evaluator.data.digest, list(study.schemes)])
        (CACHE / "budgets").mkdir(parents=True, exist_ok=True)
        self._file = CACHE / "budgets" / f"{study.name}-{seed}-{digest[:16]}.jsonl"
        self._known = {line["key"]: line for line in _lines(self._file)}

    def bits(self, choice: Choice) -> float:
        """Mean bits of a code."""
        return self.cost.total(choice) - self.scales

    def report(self, found: Found, method: str, choices: dict[float, Choice]) -> None:
        """Keep each budget's choice, and its held-out losses."""
        for budget, choice in choices.items():
            assert self.cost.total(choice) <= (budget + self.scales) * (1 + 1e-6), budget
        found.losses[method] = {budget: self.samples(choice, "held_out") for budget, choice in choices.items()}
        found.choices[method] = {budget: choice.tolist() for budget, choice in choices.items()}

    def samples(self, choice: Choice, split: Split, batches: range | None = None) -> Floats:
        """The losses of a choice on a split, or on some of its batches."""
        part = [batches.start, batches.stop] if batches else None
        key = content_key([choice.tolist(), split, part])
        if key not in self._known:
            began = time.perf_counter()
            allocation = layer_schemes(self.space, choice)
            losses = self.evaluator.measure_samples(allocation, split, batches)["loss"]
            self._keep({"key": key, "losses": losses, "seconds": time.perf_counter() - began})
        self._spend(split, self._known[key]["seconds"])
        return np.array(self._known[key]["losses"])

    def table(self) -> Floats:
        """The metric's, and its seconds on an evaluator that had computed nothing."""
        key = content_key(["table", METRIC])
        if key not in self._known:
            began = time.perf_counter()
            table = fill(METRIC, self.evaluator, self.space)
            self._keep({"key": key, "values": table.to_json()["values"], "seconds": time.perf_counter() - began})
        self._spend("table", self._known[key]["seconds"])
        values: Floats = np.array(self._known[key]["values"], dtype=float)
        return values

    def measure(self, choices: Sequence[Choice], batches: range) -> list[Floats]:
        """Of the calibration split: `search.racing.Measure`."""
        return [self.samples(choice, "calibration", batches) for choice in choices]

    def expand(self, choice: Choice) -> Expansion:
        """`search.expansion.Expand`."""

        def compute(task: Task, items: Sequence[Item]) -> list[Result]:
            return [self._computed(task, item) for item in items]

        return expansion(compute, self.space, self.sizes, choice)

    def _computed(self, task: Task, item: Item) -> Result:
        key = content_key([task.name, task.version, item])
        if key not in self._known:
            began = time.perf_counter()
            result = task.run(self.evaluator, item)
            self._keep({"key": key, "result": result, "seconds": time.perf_counter() - began})
        self._spend("expansion", self._known[key]["seconds"])
        found: Result = self._known[key]["result"]
        return found

    def _keep(self, line: dict[str, Any]) -> None:
        self._known[line["key"]] = line
        self.seconds_now += line["seconds"]
        with self._file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def _spend(self, name: str, seconds: float) -> None:
        self.spent[name] = self.spent.get(name, 0.0) + seconds


def predict(case: Case, found: Found) -> None:
    """The exact frontier at all budgets and, of whole layers, the uniform configurations."""
    sweep, table = case.sweep, case.table()
    began = time.perf_counter()
    exact = {budget: sweep.frontier(table, np.array([budget + case.scales]), prove=True)[0] for budget in BUDGETS}
    found.seconds["unrefined"] = case.spent["table"] + time.perf_counter() - began
    found.predicted = {budget: float(table[np.arange(len(choice)), choice].sum()) for budget, choice in exact.items()}
    with remembering(case.evaluator):
        case.report(found, "unrefined", exact)
        if not case.study.layers:
            case.report(found, "uniform", {round(case.bits(one), 3): one for one in case.uniform})


def compare(case: Case, found: Found, rival: Name) -> None:
    """What a rival allocates at all budgets."""
    theirs = allocate(rival, case.study.name, calibration_inputs(case.evaluator))
    with remembering(case.evaluator):
        case.report(found, rival, {budget: _choice(case.space, of) for budget, of in theirs.budgets.items()})
    found.seconds[rival] = theirs.seconds["whole run for one budget"]


def refine(case: Case, found: Found) -> None:
    """Refine and accept as `workers.pipeline` does: baselines, predicted frontier, draws (not of groups of channels),
    rounds."""
    features, split = Features.of(case.space, {METRIC: case.table()}), case.space.splits_layers
    ladders = Ladders.of(features.predicted, case.cost.table, case.space.layer_of) if split else None
    case.spent.clear()
    began, measuring = time.perf_counter(), case.seconds_now
    with remembering(case.evaluator):
        loop = Refinement(
            case.sweep,
            features,
            case.measure,
            case.sizes,
            case.study.evaluations,
            case.seed,
            expand=case.expand,
            ladders=ladders,
        )
        loop.whole(case.uniform, "uniform")
        if split:
            loop.whole(loop.sweep.frontier(loop.surrogate().table), "ilp")
        else:
            loop.begin(())
        for trials in loop.rounds():
            print(f"  {loop.spent:.1f} evaluations, gain {loop.gain:.2g}, {len(trials)} more", flush=True)
        # Fitting takes its time now, measuring took it when it was measured.
        fitting = max(0.0, time.perf_counter() - began - (case.seconds_now - measuring))
        chosen = choose(case, loop.trials)
        found.seconds["refined"] = found.seconds["unrefined"] + fitting + sum(case.spent.values())
        found.evaluations = loop.spent
        found.trials = [Tried(case.bits(trial.choice), trial.loss, trial.expected) for trial in loop.trials]
        case.report(found, "refined", dict(zip(BUDGETS[::-1], chosen, strict=True)))


def choose(case: Case, trials: list[Trial]) -> list[Choice]:
    """Of every level the accepted configuration that loses least on the acceptance split."""
    sweep = case.sweep
    choices, tiers = [trial.choice for trial in trials], [trial.tier for trial in trials]
    chosen = finalists(sweep, choices, np.array([trial.loss for trial in trials]), tiers)
    losses = np.array([case.samples(choices[index], "acceptance") for index in chosen])
    totals = sweep.totals([choices[index] for index in chosen])
    samples = [trials[index].samples for index in chosen]
    stands = accepted(losses, totals[:, None], [tiers[index] for index in chosen], samples)
    means = np.where(stands, losses.mean(axis=1), np.inf)
    within = [np.where(totals <= level * (1 + TOLERANCE), means, np.inf) for level in sweep.levels]
    return [choices[chosen[int(one.argmin())]] for one in within]


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _choice(space: Space, bits: dict[str, int]) -> Choice:
    columns = {scheme.weight_bits: column for column, scheme in enumerate(space.schemes)}
    return np.array([columns[bits[unit.layers[0].name]] for unit in space.units], dtype=np.int64)
