"""A model whose layers lie on different devices finds what it finds on one.

Nobody can compute with tensors of two devices, nor of those of tests/workers/pretend.py. As torch knows of them for as
long as a process lives, the tests ask another process.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from search.request import Calibration
from search.scheme import Scheme
from tests.workers.pretend import FIRST, Pretending, register
from tests.workers.sensitivity.support import fill, space_of
from workers.calibration import load_data
from workers.evaluator import Evaluator
from workers.models import load_model
from workers.placement import Placement, devices_of
from workers.sensitivity import FILLS

CPU = torch.device("cpu")
BLOCKS = {"model.layers.0": FIRST, "model.layers.1": "cpu", "model.norm": "cpu"}
PARTS = {"model.embed_tokens": FIRST, "model.rotary_emb": FIRST, **BLOCKS, "lm_head": FIRST}
"""What leaves the last block comes back to the first device: the head's input lies on another than its weight."""

BEYOND = {"hessian_trace", "hessian_trace_labels", "pqi", "pqi_absolute"}
"""Metrics left out: torch has no forward derivatives of tensors that pretend; the others take long, and are built of
what those that are here are built of."""


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _pretend) as executor:
        yield executor


@pytest.fixture(scope="module")
def source(model_folder: Callable[[str], Path]) -> str:
    return str(model_folder("tiny_llama"))


def _pretend() -> None:
    torch.set_num_threads(1)
    register()


def evaluator(source: str, placement: Placement) -> Evaluator:
    loaded = load_model(source, placement)
    return Evaluator(loaded, load_data(Calibration(samples=2, sequence_length=8), loaded))


def on_both(source: str, ask: Callable[..., object], *about: object) -> tuple[object, object]:
    """What is answered of a model that is spread over two devices, and of one on the CPU."""
    with Pretending():
        spread = ask(evaluator(source, {name: torch.device(device) for name, device in PARTS.items()}), *about)
    return spread, ask(evaluator(source, CPU), *about)


def devices(asked: Evaluator) -> list[str]:
    return sorted({str(parameter.device) for parameter in asked.loaded.model.parameters()})


def losses(asked: Evaluator) -> list[dict[str, float]]:
    schemes = [Scheme.parse("w4a8", "schemes"), Scheme.parse("w3a16g16", "schemes")]
    return [asked.measure({name: scheme for name in asked.layers if "embed" not in name}) for scheme in schemes]


def table(asked: Evaluator, metric: str) -> np.ndarray:
    others = ["lm_head", "*embed*", "*self_attn*", "*gate_proj", "*up_proj"]
    space = space_of(asked, "w3a16", "w4a8", ignore=others)
    return fill(metric, asked, space).values.to_numpy()


def test_the_parts_of_a_model_lie_where_they_were_put(process: ProcessPoolExecutor, source: str) -> None:
    assert process.submit(on_both, source, devices).result() == (["cpu", FIRST], ["cpu"])
    assert list(map(str, devices_of({"a": CPU, "b": torch.device("meta"), "c": CPU}))) == ["cpu", "meta"]


def test_an_allocation_is_worth_the_same_on_two_devices(process: ProcessPoolExecutor, source: str) -> None:
    spread, alone = process.submit(on_both, source, losses).result()
    assert isinstance(alone, list)
    assert alone[0]["loss"] != alone[1]["loss"]
    for one, other in zip(spread, alone, strict=True):  # type: ignore[call-overload]
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("metric", sorted(FILLS.keys() - BEYOND))
def test_a_metric_fills_the_same_table_on_two_devices(metric: str, process: ProcessPoolExecutor, source: str) -> None:
    spread, alone = process.submit(on_both, source, table, metric).result()
    np.testing.assert_allclose(spread, alone, rtol=1e-3, atol=1e-8)
