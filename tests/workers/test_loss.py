"""The loss is zero where nothing changed, equals the textbook's, and is exact where it is small."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cosine
from scipy.stats import entropy

from search.inventory import Task
from workers.loss import curvature, divergence, has_labels, labelled_loss, masked_mean, next_token_loss, score

seeds = st.integers(0, 2**31)
SHAPES = {
    "embedding": (3, 16),
    "image-classification": (3, 10),
    "sequence-classification": (3, 4),
    "causal-lm": (2, 5, 11),
}
every_task = pytest.mark.parametrize("task", SHAPES)


def outputs(task: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(SHAPES[task], generator=generator) * 3 for _ in range(2))


@every_task
@settings(deadline=None)
@given(seeds)
def test_nothing_changed_is_no_loss_and_no_slope(task: str, seed: int) -> None:
    reference, _ = outputs(task, seed)
    output = reference.clone().requires_grad_()
    loss = divergence(task, output, reference)
    assert loss.shape == (len(reference),)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-12, rtol=0)
    (slope,) = torch.autograd.grad(loss.sum(), output)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-6, rtol=0)


@every_task
@settings(deadline=None)
@given(seeds)
def test_equals_scipy(task: str, seed: int) -> None:
    reference, output = outputs(task, seed)
    if task == "embedding":
        expected = [cosine(a, b) for a, b in zip(output.double(), reference.double(), strict=True)]
    else:
        p, q = (logits.double().softmax(-1).numpy() for logits in (reference, output))
        expected = entropy(p, q, axis=-1).reshape(len(reference), -1).mean(axis=1)
    np.testing.assert_allclose(divergence(task, output, reference), expected, rtol=1e-5, atol=1e-7)


@every_task
def test_a_small_loss_is_not_lost_in_rounding(task: str) -> None:
    reference, output = outputs(task, 0)
    output = reference + output * 1e-4
    exact = divergence(task, output.double(), reference.double())
    assert exact.max() < 1e-6
    torch.testing.assert_close(divergence(task, output, reference).double(), exact.double(), rtol=0.05, atol=1e-10)


@settings(deadline=None)
@given(seeds)
def test_masked_positions_do_not_count(seed: int) -> None:
    reference, output = outputs("causal-lm", seed)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    loss = divergence("causal-lm", output, reference, mask)
    shortened = divergence("causal-lm", output[:1, :3], reference[:1, :3])
    torch.testing.assert_close(loss[:1], shortened)
    output[0, 3:] = 1e4
    torch.testing.assert_close(divergence("causal-lm", output, reference, mask), loss)


def test_a_sequence_that_is_masked_whole_counts_as_nothing() -> None:
    assert masked_mean(torch.ones(1, 4), torch.zeros(1, 4)).item() == 0


def test_next_token_loss_is_torchs_cross_entropy() -> None:
    logits = torch.randn(2, 6, 11)
    tokens = torch.randint(0, 11, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    expected = [
        torch.nn.functional.cross_entropy(logits[row, : length - 1], tokens[row, 1:length])
        for row, length in enumerate(mask.sum(1))
    ]
    torch.testing.assert_close(next_token_loss(logits, tokens, mask), torch.stack(expected))


@every_task
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_curvature_is_the_hessian_of_the_divergence_where_it_is_zero(task: Task, seed: int) -> None:
    output, change = outputs(task, seed)
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 0, 0]]) if task == "causal-lm" else None

    def loss(moved: torch.Tensor) -> torch.Tensor:
        return divergence(task, moved.double(), output.double(), mask).sum()

    _, expected = torch.autograd.functional.hvp(loss, output, change)
    assert torch.allclose(curvature(task, output, change, mask), expected, rtol=1e-3, atol=1e-5)


@every_task
def test_the_outer_product_of_scores_is_on_average_the_curvature_of_the_mean_divergence(task: str) -> None:
    output, _ = outputs(task, 3)
    output = output / 3
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]) if task == "causal-lm" else None
    generator = torch.Generator().manual_seed(0)
    scores = torch.stack([score(task, output, mask, generator).flatten() for _ in range(10_000)]).double()
    covariance = scores.T @ scores / len(scores)

    exact = torch.empty_like(covariance)
    for index, unit in enumerate(torch.eye(output.numel())):
        exact[index] = curvature(task, output, unit.view_as(output), mask).flatten().double() / len(output)
    error = (scores.square().T @ scores.square() / len(scores) - covariance.square()).clamp_min(0).sqrt()
    error /= len(scores) ** 0.5
    assert ((covariance - exact).abs() <= 5.5 * error + 1e-6).all()
    assert scores.mean(0).abs().max() < 0.05


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_the_score_of_an_output_that_is_not_finite_is_not_finite_and_others_are(broken: float) -> None:
    output, _ = outputs("image-classification", 0)
    output[1, 2] = broken
    drawn = score("image-classification", output, None, torch.Generator().manual_seed(0))
    assert drawn.isfinite().all(dim=1).tolist() == [True, False, True]


def test_only_what_has_labels_has_a_labelled_loss() -> None:
    labels = {"labels": torch.tensor([1, 0, 2])}
    assert has_labels("causal-lm", {})
    assert has_labels("image-classification", labels)
    assert not has_labels("image-classification", {})
    assert not has_labels("embedding", labels)
    logits, _ = outputs("image-classification", 0)
    expected = [-float(row.log_softmax(0)[label]) for row, label in zip(logits, [1, 0, 2], strict=True)]
    assert labelled_loss("image-classification", logits, labels).tolist() == pytest.approx(expected, rel=1e-5)
