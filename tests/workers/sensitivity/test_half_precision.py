"""Models that compute in bfloat16: every metric sees about what it sees in float32."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from search.metrics import METRICS
from search.request import Calibration
from tests.workers.sensitivity.support import fill, space_of
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.sensitivity import FILLS

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def in_both(model_folder: Callable[[str], Path]) -> tuple[Evaluator, Evaluator]:
    """A Llama in float32 and in bfloat16."""
    source, calibration = str(model_folder("tiny_llama")), Calibration(samples=8, sequence_length=16)
    spec = EvaluatorSpec(source, calibration)
    half = EvaluatorSpec(source, calibration, dtype="bfloat16")
    return Evaluator.build(spec), Evaluator.build(half)


@pytest.mark.parametrize("metric", sorted(FILLS))
def test_a_table_in_bfloat16_is_close_to_the_one_in_float32(metric: str, in_both: tuple[Evaluator, Evaluator]) -> None:
    full, half = (
        fill(metric, evaluator, space_of(evaluator, "w2a16", "w3a8", ignore=["lm_head", "*embed*"]))
        for evaluator in in_both
    )
    assert np.isfinite(half.values.to_numpy()).all()
    assert half.values.sum().to_numpy() == pytest.approx(full.values.sum().to_numpy(), rel=0.25)
    correlation = np.corrcoef(full.values.to_numpy().ravel(), half.values.to_numpy().ravel())[0, 1]
    assert correlation > 0.9, METRICS[metric].title
