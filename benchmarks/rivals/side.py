"""What the scripts that run in a rival's environment share. Nothing of this project is imported, and little else."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

GROUP = 64
"""Weights of a linear layer that share a scale."""

TIE = 1e-9


@dataclass(frozen=True)
class Question:
    """A model of a study, the calibration samples by the name of the model's input, the widths that a layer may take,
    the budgets (mean bits of a code, scales not counted), and whether layers that runtimes fuse share their bits."""

    study: str
    model: str
    inputs: dict[str, np.ndarray]
    bits: list[int]
    budgets: list[float]
    grouped: bool


def asked(description: str, studies: Mapping[str, object]) -> Question:
    """`STUDY MODEL INPUTS.npz --bits B… --budgets A…`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("study", choices=studies)
    parser.add_argument("model", help="a file or folder")
    parser.add_argument("inputs", help="an .npz file")
    parser.add_argument("--bits", type=int, nargs="+", required=True)
    parser.add_argument("--budgets", type=float, nargs="+", required=True)
    parser.add_argument("--grouped", action="store_true", help="layers that runtimes fuse share their bits")
    given = parser.parse_args()
    return Question(given.study, given.model, dict(np.load(given.inputs)), given.bits, given.budgets, given.grouped)


def answer(package: str, model: nn.Module, budgets: dict[float, dict[str, int]], seconds: dict[str, float]) -> None:
    """Print JSON on a line of its own. Raises RuntimeError when an allocation is not within its budget."""
    for budget, bits in budgets.items():
        sizes = {name: model.get_submodule(name).weight.numel() for name in bits}
        mean = sum(sizes[name] * bits[name] for name in bits) / sum(sizes.values())
        if mean > budget + TIE:
            raise RuntimeError(f"{package} gave {mean} bits on average where {budget} were asked for")
    about = {"version": importlib.metadata.version(package), "threads": torch.get_num_threads()}
    print()
    print(json.dumps({"budgets": budgets, "seconds": seconds, **about}))


def timed(owner: Any, *functions: str) -> dict[str, list[float]]:
    """The seconds that each call of the named functions of a class or module will have taken."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}

    def measure(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                seconds[name].append(time.perf_counter() - began)

        return run

    for name in functions:
        setattr(owner, name, measure(name, getattr(owner, name)))
    return seconds
