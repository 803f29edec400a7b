"""What an evaluator asks of a machine, and how many a machine has room for."""

import math
from pathlib import Path

import pytest
import torch

from search.request import Calibration
from tests import models
from workers.evaluator import EvaluatorSpec
from workers.memory import SEARCHING
from workers.models import load_model
from workers.pools.demand import (
    Demand,
    demand_on_gpus,
    demand_on_processors,
)
from workers.pools.gpus import ASK, smallest_gpu, weight_bytes

GB = 10**9


@pytest.mark.parametrize(
    ("demand", "resources", "room"),
    [
        (Demand(4), {"CPU": 9}, 2),
        (Demand(4), {"CPU": 3}, 0),
        (Demand(1), {"memory": 1e9}, 0),
        (Demand(1, 1), {"CPU": 16, "GPU": 4}, 4),
        (Demand(1, 0.5), {"CPU": 16, "GPU": 4}, 8),
        (Demand(1, 0.4), {"CPU": 16, "GPU": 4}, 8),  # what is left of a GPU is of no use
        (Demand(1, 0.1), {"CPU": 16, "GPU": 1}, 10),
        (Demand(1, 3), {"CPU": 16, "GPU": 8}, 2),
        (Demand(1, 2), {"CPU": 16, "GPU": 1}, 0),
        (Demand(1, 0.25), {"CPU": 2, "GPU": 4}, 2),
        (Demand(1, 1), {"CPU": 16}, 0),
    ],
)
def test_a_machine_has_room_for_so_many(demand: Demand, resources: dict[str, float], room: int) -> None:
    assert demand.fit(resources) == room


def test_evaluators_share_the_cores_of_the_smallest_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = [{"CPU": 8.0}, {"CPU": 16.0}, {"memory": 1.0}, {"CPU": 0.0}]
    assert demand_on_processors(machines) == Demand(8)
    monkeypatch.setenv("BITFRONTIER_EVALUATORS", "3")
    assert demand_on_processors(machines) == Demand(2)
    monkeypatch.setenv("BITFRONTIER_EVALUATORS", "99")
    assert demand_on_processors(machines) == Demand(1)


def test_without_a_machine_that_offers_a_core_nothing_is_known() -> None:
    assert demand_on_processors([{"memory": 1.0}]) is None


@pytest.mark.parametrize(("weights", "gpus"), [(1 * GB, 1), (25 * GB, 1), (40 * GB, 2), (140 * GB, 6), (None, 1)])
def test_a_model_takes_as_many_gpus_as_it_needs(weights: int | None, gpus: int) -> None:
    assert demand_on_gpus(weights, 80 * GB) == Demand(1, gpus)
    assert weights is None or gpus == math.ceil(SEARCHING * weights / (80 * GB))


def test_what_is_asked_for_is_not_second_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFRONTIER_GPUS_PER_EVALUATOR", "0.5")
    assert demand_on_gpus(140 * GB, 80 * GB) == Demand(1, 0.5)


def test_weights_are_counted_from_the_headers_of_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFRONTIER_MODELS", str(tmp_path))
    folder = models.tiny_gpt2(tmp_path / "gpt2")
    loaded = load_model("gpt2", torch.device("cpu"))
    held = sum(parameter.numel() for parameter in loaded.model.parameters())
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        spec = EvaluatorSpec(folder.name, Calibration(), dtype=dtype)
        assert weight_bytes(spec) == held * size


def test_the_smallest_gpu_is_what_its_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert smallest_gpu() is None
    tool = tmp_path / ASK[0]
    tool.write_text("#!/bin/sh\necho 81559\necho 40960\n")
    tool.chmod(0o755)
    assert smallest_gpu() == 40960 * 2**20
