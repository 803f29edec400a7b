"""The expansion of the loss at a rounded model against dense derivatives, against measurements, and on every model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from search import allocation
from search.expansion import FOLDS, Expansion
from search.request import Calibration
from search.scheme import Scheme
from search.space import Space
from tests.workers.sensitivity.support import compute_on, fill, space_of, subject
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.loss import divergence
from workers.quantizers.activation import round_activation
from workers.sensitivity import expansion as module
from workers.sensitivity.expansion import EXPANSION, expansion
from workers.tasks import Item, Result, Task


def expand(evaluator: Evaluator, space: Space, choice: np.ndarray) -> Expansion:
    return expansion(compute_on(evaluator), space, subject(evaluator, space).batch_sizes, choice)


def raw(evaluator: Evaluator, space: Space, choice: np.ndarray, **changes: object) -> list[Result]:
    """What the folds say."""
    results: list[Result] = []

    def compute(task: Task, items: list[Item]) -> list[Result]:
        results.extend(task.run(evaluator, item | changes) for item in items)
        return results

    expansion(compute, space, subject(evaluator, space).batch_sizes, choice)
    return results


def loss_of(evaluator: Evaluator, weights: dict[str, Tensor]) -> Tensor:
    """The mean divergence of a net from itself at full precision, as a function of some weights."""
    losses = []
    for index, batch in enumerate(evaluator.batches("calibration")):
        output = torch.func.functional_call(evaluator.loaded.model, weights, (batch["pixel_values"],))
        losses.append(divergence(evaluator.loaded.task, output, evaluator.reference("calibration", index)))
    return torch.cat(losses).mean()


def mixed(space: Space, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([rng.choice(np.flatnonzero(row)) for row in space.allowed])


def test_the_gradient_is_that_of_the_rounded_model(tiny: Evaluator) -> None:
    space = space_of(tiny, "w2a16", "w4a16", "w16a16")
    choice = np.array([0, 1])
    results = raw(tiny, space, choice)
    weights = {f"{name}.weight": layer.weight.clone().requires_grad_() for name, layer in tiny.layers.items()}
    gradients = dict(zip(tiny.layers, torch.autograd.grad(loss_of(tiny, weights), list(weights.values())), strict=True))
    for unit in space.units:
        for scheme in space.schemes:
            change = tiny.weight(unit.name, scheme) - tiny.layers[unit.name].weight
            exact = float((gradients[unit.name] * change).sum())
            found = np.mean([result["gradient"][unit.name][str(scheme)] for result in results])
            assert found == pytest.approx(exact, rel=1e-4, abs=1e-7), (unit.name, scheme)


@contextmanager
def every_label(label: int) -> Iterator[None]:
    """Instead of a random label this one: over all of them, the squares add up to the Fisher diagonal."""

    def score(_task: str, output: Tensor, _mask: object, _generator: object) -> Tensor:
        p = output.softmax(-1)
        drawn: Tensor = p[..., label, None].sqrt() * (torch.eye(p.shape[-1])[label] - p)
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "score", score)
        yield


def test_the_curvature_is_the_fisher_diagonal_of_the_rounded_model(tiny: Evaluator) -> None:
    space = space_of(tiny, "w2a16", "w4a16")
    choice = np.array([0, 1])
    found = []
    for label in range(5):
        with every_label(label):
            found.append(raw(tiny, space, choice)[0]["curvature"])
    (image,) = tiny.batches("calibration")[0]["pixel_values"][:1]
    for name, to in (("conv", "w4a16"), ("head", "w2a16")):
        weight = tiny.layers[name].weight

        def output(weight: Tensor, name: str = name) -> Tensor:
            given: Tensor = torch.func.functional_call(tiny.loaded.model, {f"{name}.weight": weight}, (image[None],))[0]
            return given

        jacobian = torch.autograd.functional.jacobian(output, weight).flatten(1)
        p = output(weight).softmax(-1)
        diagonal = (jacobian.T @ (p.diag() - p.outer(p)) @ jacobian).diag()
        change = (tiny.weight(name, Scheme.parse(to)) - weight).flatten()
        exact = float(diagonal @ change.square()) / 2
        assert sum(result[name][to] for result in found) == pytest.approx(exact, rel=1e-4)


def test_folds_are_shares_of_one_whole(tiny: Evaluator) -> None:
    space = space_of(tiny, "w2a16", "w4a8")
    choice = np.array([1, 1])
    parts = raw(tiny, space, choice)
    assert len(parts) == FOLDS
    whole = raw(tiny, space, choice, start=0, stop=8)[0]
    for name, schemes in whole["gradient"].items():
        for text, value in schemes.items():
            assert np.mean([part["gradient"][name][text] for part in parts]) == pytest.approx(value, rel=1e-4, abs=1e-7)


def test_of_a_rounded_input_the_unrounded_one_is_known(tiny: Evaluator) -> None:
    """Back to full precision, x̂ changes by x − x̂."""
    space = space_of(tiny, "w8a16", "w8a4")
    results = raw(tiny, space, np.array([1, 0]))
    head, sums = tiny.layers["head"].module, []
    for index, batch in enumerate(tiny.batches("calibration")):
        x = torch.nn.functional.gelu(tiny.layers["conv"].module(batch["pixel_values"])).mean((2, 3))
        rounded = round_activation(x, 4).requires_grad_()
        reference = tiny.reference("calibration", index)
        (g,) = torch.autograd.grad(divergence(tiny.loaded.task, head(rounded), reference).sum(), rounded)
        sums.append(float((g * (x - rounded).detach()).sum()))
    found = np.mean([result["gradient"]["head"]["w8a16"] for result in results])
    assert abs(found) > 1e-6
    assert found == pytest.approx(sum(sums) / 8, rel=1e-4)


def test_it_foretells_what_single_changes_do_and_sensitivities_do_not(bert: Evaluator) -> None:
    """At two bits the layers' errors fall in with one another: the gradient there sees it."""
    space = space_of(bert, "w2a16g16", "w3a16g16", ignore=["*embed*"])
    choice = mixed(space)
    expanded, table = expand(bert, space, choice), fill("fisher", bert, space).values.to_numpy()
    units = np.arange(len(choice))
    before = loss(bert, space, choice)
    foretold, added, true = [], [], []
    for unit in units:
        other = choice.copy()
        other[unit] = 1 - choice[unit]
        true.append(loss(bert, space, other) - before)
        foretold.append(expanded.change(other))
        added.append(table[units, other].sum() - table[units, choice].sum())
    assert np.corrcoef(foretold, true)[0, 1] > 0.9
    assert np.corrcoef(foretold, true)[0, 1] > np.corrcoef(added, true)[0, 1]


def loss(evaluator: Evaluator, space: Space, choice: np.ndarray) -> float:
    return evaluator.measure(allocation.layer_schemes(space, choice), "calibration")["loss"]


def test_every_model_has_one_and_keeps_its_weights(any_evaluator: Evaluator) -> None:
    columns = {layer.columns for layer in any_evaluator.inventory.layers}
    schemes = ("w2a16", "w4a8", "w16a16") if any(one % 16 for one in columns) else ("w2a16g16", "w4a8", "w16a16")
    space = space_of(any_evaluator, *schemes, ignore=["*embed*", "*wte", "*wpe", "*experts*"])
    before = {name: layer.parameter.detach().clone() for name, layer in any_evaluator.layers.items()}
    any_evaluator.apply({})
    choice = mixed(space, 1)
    found = expand(any_evaluator, space, choice)
    assert np.isfinite(found.changes[space.allowed]).all()
    assert (found.changes[np.arange(len(choice)), choice] == 0).all()
    assert np.isinf(found.changes[~space.allowed]).all()
    assert np.unique(found.changes[space.allowed]).size > len(space.units)
    any_evaluator.apply({})
    assert all(torch.equal(layer.parameter, before[name]) for name, layer in any_evaluator.layers.items())


def test_groups_of_channels_add_up_to_their_layer(model_folder: Callable[[str], Path]) -> None:
    source = EvaluatorSpec(str(model_folder("tiny_llama")), Calibration(samples=4, sequence_length=16))
    evaluator = Evaluator.build(source)
    asked: dict[str, object] = {"ignore": ["*embed*", "lm_head"]}
    whole = space_of(evaluator, "w3a16g32", "w8a16", **asked)
    parts = space_of(evaluator, "w3a16g32", "w8a16", granularity="channels", channels=16, **asked)
    of_whole, of_parts = (raw(evaluator, space, space.uniform(space.schemes[0])) for space in (whole, parts))
    for name, schemes in of_whole[1]["gradient"].items():
        added = sum(
            changes["w8a16"] for part, changes in of_parts[1]["gradient"].items() if part.partition("[")[0] == name
        )
        assert added == pytest.approx(schemes["w8a16"], rel=1e-3, abs=1e-8)


def test_a_change_that_is_not_finite_is_not_taken(tiny: Evaluator) -> None:
    space = space_of(tiny, "w2a16", "w4a16")

    def compute(task: Task, items: list[Item]) -> list[Result]:
        results = [task.run(tiny, item) for item in items]
        results[0]["gradient"]["head"]["w4a16"] = None
        return results

    found = expansion(compute, space, subject(tiny, space).batch_sizes, np.array([0, 0]))
    assert found.changes[1, 1] == np.inf
    assert np.isfinite(found.changes[0]).all()


def test_it_is_kept_by_its_content() -> None:
    assert EXPANSION.uses_data
