"""The time of a sensitivity table of SmolLM2-135M: `fisher` here, the gradient score of NVIDIA's ModelOpt there."""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import table, write
from scripts.fetch_models import SMOLLM2, cache_folder
from search.request import Calibration, SpaceRequest
from search.space import build_space
from search.targets import find_target
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.sensitivity import FILLS, Subject
from workers.tasks import Item, Result, Task

WIDTHS = (2, 3, 4, 6, 8)
SAMPLES, LENGTH = 16, 256
SIDE = Path(__file__).with_name("modelopt_side.py")


def main() -> None:
    """Time both on the same tokens, one after the other, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.modelopt", description=__doc__)
    parser.add_argument("--python", default=".venv-modelopt/bin/python", help="ModelOpt's own environment")
    parser.add_argument("--metric", default="fisher", choices=FILLS)
    parser.add_argument("--batch", type=int, default=1, help="ModelOpt's sequences at a time")
    asked = parser.parse_args()

    source = str(cache_folder() / SMOLLM2.filename)
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.npy"
        ours, units = fill(source, asked.metric, tokens)
        theirs = auto_quantize(asked.python, source, tokens, asked.batch)
    if theirs["layers"] != units:
        raise RuntimeError(f"ModelOpt scored {theirs['layers']} layers, {asked.metric} {units}")
    together = theirs["calibration"] + theirs["scoring"]
    rows: list[dict[str, object]] = [
        {"": f"`{asked.metric}`: evaluator built to table filled", "seconds": ours, "× `fisher`": 1.0},
        {"": "ModelOpt, calibration", "seconds": theirs["calibration"], "× `fisher`": theirs["calibration"] / ours},
        {"": "ModelOpt, gradient scoring", "seconds": theirs["scoring"], "× `fisher`": theirs["scoring"] / ours},
        {"": "ModelOpt, both", "seconds": together, "× `fisher`": together / ours},
        {"": "ModelOpt, its solver", "seconds": theirs["solving"], "× `fisher`": theirs["solving"] / ours},
    ]
    write(
        "modelopt",
        f"Time of a sensitivity table on SmolLM2-135M: {asked.metric} and ModelOpt",
        "make bench-modelopt",
        [
            f"{units} layers × {len(WIDTHS)} schemes (weights only, 2, 3, 4, 6 and 8 bits, groups of 64), {SAMPLES} × "
            f"{LENGTH} tokens of the Python reference, float32, {torch.get_num_threads()} threads here and "
            f"{theirs['threads']} there, in one run one after the other; loading the model is not counted. ModelOpt "
            f"{theirs['version']} (torch {theirs['torch']}): `auto_quantize` with method `gradient` on "
            f"{SAMPLES // asked.batch} batches of {asked.batch} for calibration and for scoring, next-token loss.",
            table([{key.replace("fisher", asked.metric): value for key, value in row.items()} for row in rows]),
            "One run each. Formats that only round weights need no calibration data: whoever knows that asks ModelOpt "
            "for one step instead of as many as for scoring, and compares with its scoring alone. The two compute "
            "different scores: this is their time, and `make bench-proxies` how well each ranks.",
        ],
    )


def fill(source: str, metric: str, tokens: Path) -> tuple[float, int]:
    """Seconds from the evaluator built to the metric's table filled, and its units; the tokens go to a file."""
    calibration = Calibration(dataset="python-docs", samples=SAMPLES, sequence_length=LENGTH)
    evaluator = Evaluator.build(EvaluatorSpec(source, calibration))
    batches = evaluator.batches("calibration")
    np.save(tokens, torch.cat([batch["input_ids"] for batch in batches]).numpy())
    request = SpaceRequest(schemes=tuple(f"w{bits}a16g64" for bits in WIDTHS), ignore=("model.embed_tokens", "lm_head"))
    space = build_space(evaluator.inventory, request, find_target("generic"))

    def compute(task: Task, items: Sequence[Item]) -> list[Result]:
        return [task.run(evaluator, item) for item in items]

    sizes = tuple(len(batch["input_ids"]) for batch in batches)
    began = time.perf_counter()
    FILLS[metric](compute, Subject(space, sizes, frozenset({metric})))
    return time.perf_counter() - began, len(space.units)


def auto_quantize(python: str, source: str, tokens: Path, batch: int) -> dict[str, float]:
    """What modelopt_side.py prints."""
    # -P: the script's folder, in which this module hides the package of its name, stays out of the path.
    command = [python, "-P", str(SIDE), source, str(tokens), str(batch), *map(str, WIDTHS)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
