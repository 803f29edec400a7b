"""ModelOpt's gradient score (NVIDIA ModelOpt 0.47, `AutoQuantizeGradientSearcher`, algorithms.py).

    score_l(s) = Σ_batches Σ_elements (g_y ⊙ Δy)²        Δy = layer(Q(x), Q(W)) − layer(x, W)

y is the layer's output and g_y the gradient there, at full precision, of the batch's mean loss on labels: a text's next
tokens, as ModelOpt's users give it. Where there are no labels, g_y is that of a label drawn from the model. The part of
the weights is the score of their rounding alone. Two things ModelOpt does besides are left to the search: it never lets
a finer scheme score worse than a coarser one, and cuts single elements at 10²⁰.

Fused experts have no output of their own: Σ (g_W ⊙ ΔW)² stands for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.func import functional_call

from search.scheme import FULL_PRECISION, Scheme
from search.space import Space
from workers.calibration import Batch, sample_count
from workers.evaluator import Evaluator, rounds_input, token_dims
from workers.loss import has_labels, labelled_loss, score
from workers.quantizers.activation import round_activation
from workers.sensitivity.backward import micro_batches, visiting
from workers.sensitivity.rounding import weight_only
from workers.sensitivity.table import Entry, Subject, Table, metric, sum_of_layers
from workers.tasks import Compute, Item, Result, Task

WITHOUT_LABELS = "there are no labels: gradients are those of labels drawn from the model"
FOR_EXPERTS = "fused experts have no output of their own: they are scored by Σ (weight gradient × rounding error)²"


@metric("gradient")
def gradient(compute: Compute, subject: Subject) -> Table:
    """ModelOpt's score of every unit at every allowed scheme; each item is a calibration batch."""
    space, samples = subject.space, sum(subject.batch_sizes)
    layers = schemes_of_layers(space)
    results = compute(
        SCORES, [{"batch": batch, "seed": 0, "layers": layers} for batch in range(len(subject.batch_sizes))]
    )

    def entry(layer: str, scheme: Scheme) -> Entry:
        if scheme == FULL_PRECISION:
            return Entry(0.0)
        both, weight, squares = map(
            sum, zip(*(result["scores"][layer][str(scheme)] for result in results), strict=True)
        )
        variance = (squares - both**2 / samples) * samples / max(samples - 1, 1)
        return Entry(min(weight, both), both - min(weight, both), max(variance, 0.0))

    labelled = all(result["labelled"] for result in results)
    notes = [] if labelled else [WITHOUT_LABELS]
    if any(layer.kind == "experts" for layer in space.layers):
        notes.append(FOR_EXPERTS)
    return Table.of(space, sum_of_layers(entry), {"labelled": labelled}, notes)


def schemes_of_layers(space: Space) -> dict[str, list[str]]:
    """Layer → the allowed schemes that round something, by name."""
    return {
        layer.name: [
            str(scheme)
            for scheme, open_ in zip(space.schemes, allowed, strict=True)
            if open_ and scheme != FULL_PRECISION
        ]
        for unit, allowed in zip(space.units, space.allowed, strict=True)
        for layer in unit.layers
    }


def backward(evaluator: Evaluator, batch: Batch, generator: torch.Generator, of: int) -> None:
    """Go backwards from the loss on labels, or from labels drawn from the model, of some samples of a batch of `of`.

    Added over all samples, gradients are those of the batch's mean loss.
    """
    task, output = evaluator.loaded.task, evaluator.loaded(batch)
    if not output.requires_grad:
        return
    if has_labels(task, batch):
        (labelled_loss(task, output, batch).sum() / of).backward()  # type: ignore[no-untyped-call]
    else:
        drawn = score(task, output.detach(), batch.get("attention_mask"), generator) * (len(output) / of) ** 0.5
        output.backward(drawn.to(output))  # type: ignore[no-untyped-call]


def _scores(evaluator: Evaluator, item: Item) -> Result:
    evaluator.apply({})
    batch = evaluator.batches("calibration")[item["batch"]]
    found = _Scores(evaluator, item["layers"], sample_count(batch))
    generator = torch.Generator(evaluator.loaded.device).manual_seed(item["seed"] * 100_003 + item["batch"])
    experts = [name for name in item["layers"] if evaluator.layers[name].layer.kind == "experts"]
    others = [name for name in item["layers"] if name not in experts]
    with ExitStack() as stack:
        if others:
            stack.enter_context(visiting(evaluator, others, left=found.visit_output))
        if experts:
            stack.enter_context(visiting(evaluator, experts, weight=found.visit_weight))
        for micro_batch, found.samples in micro_batches(evaluator, item["batch"]):
            backward(evaluator, micro_batch, generator, found.count)
    return {"labelled": has_labels(evaluator.loaded.task, batch), "scores": found.sums()}


class _Scores:
    """The scores of every sample of a batch, of layers at schemes: of both parts together, and of the weights alone."""

    def __init__(self, evaluator: Evaluator, layers: dict[str, list[str]], count: int) -> None:
        self._evaluator = evaluator
        self.count = count
        self.samples = slice(0, count)
        self._found = {
            name: {text: torch.zeros(2, count, dtype=torch.float64, device=device) for text in schemes}
            for name, schemes in layers.items()
            for device in [evaluator.layers[name].parameter.device]
        }

    def visit_output(self, name: str, x: Tensor, gradient: Tensor) -> None:
        module = self._user(name, x)
        for weight, schemes in self._by_weight(name):
            change = _output(module, x, weight - self._evaluator.layers[name].parameter.detach())
            alone = self._squares(gradient, change)
            for scheme in schemes:
                both = alone
                if scheme.quantizes_activations and rounds_input(module):
                    shift = round_activation(x, scheme.activation_bits, token_dims(module, x)) - x
                    both = self._squares(gradient, change + _output(module, shift, weight))
                self._found[name][str(scheme)][:, self.samples] += torch.stack([both, alone])

    def visit_weight(self, name: str, gradient: Tensor) -> None:
        # It is of all samples at once: counted as of the first, of which the spread then tells nothing too good.
        for weight, schemes in self._by_weight(name):
            change = weight - self._evaluator.layers[name].parameter.detach()
            for scheme in schemes:
                self._found[name][str(scheme)][:, self.samples.start] += _sum((gradient * change).square())

    def sums(self) -> dict[str, dict[str, list[float]]]:
        """Layer → scheme → [score, score of the weights alone, Σ of the samples' squared scores]."""
        return {
            name: {
                text: [float(samples[0].sum()), float(samples[1].sum()), float(samples[0].square().sum())]
                for text, samples in schemes.items()
            }
            for name, schemes in self._found.items()
        }

    def _user(self, name: str, x: Tensor) -> nn.Module:
        """The module that made this use of a weight: one tied to an embedding takes tokens, or features."""
        modules = self._evaluator.modules(name)
        return next(module for module in modules if isinstance(module, nn.Embedding) != x.is_floating_point())

    def _by_weight(self, name: str) -> Iterator[tuple[Tensor, list[Scheme]]]:
        """Each Q(W) of a layer, with the schemes that share it."""
        schemes = sorted(map(Scheme.parse, self._found[name]), key=weight_only)
        for _, group in groupby(schemes, key=weight_only):
            members = list(group)
            yield self._evaluator.weight(name, members[0]), members

    def _squares(self, gradient: Tensor, change: Tensor) -> Tensor:
        """Σ (gradient ⊙ change)² of every sample."""
        squares = (gradient.float() * change.float()).square()
        count = self.samples.stop - self.samples.start
        if len(squares) % count:
            # Tokens of all samples, sorted by expert: counted as of the first, like `visit_weight`.
            return nn.functional.pad(_sum(squares).view(1), (0, count - 1))
        return _sum(squares.reshape(count, -1), dim=1)


def _output(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What `module` gives with another weight and no bias: linear in both."""
    parameters = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters(recurse=False)}
    output: Tensor = functional_call(module, parameters | {"weight": weight}, (x,))
    return output


def _sum(values: Tensor, dim: int | None = None) -> Tensor:
    return values.sum(dim=dim, dtype=torch.float64)


SCORES = Task("gradient", 2, _scores)
"""Item: a batch, a seed, layers with their schemes. Result: whether there were labels, and layer → scheme → [score,
score of the weights alone, Σ of the samples' squared scores]."""
