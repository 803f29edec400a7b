"""AutoRound AutoScheme's score (Intel AutoRound 0.16, auto_scheme/delta_loss.py, `AutoSchemeWrapperLinear`).

    score_l(s) = Σ_batches ( Σ |g_W ⊙ (W − Q(W))| + Σ |g_x ⊙ (x − Q(x))| )

The gradients are those of the batch's mean loss on labels, with *all* layers at the scheme: of the rounded weight and
of the rounded input, which they pass straight through. Absolute values are taken of each batch's gradient and then
added. A layer that may not take the scheme keeps full precision. Where there are no labels, they are drawn from the
quantized model.

A batch is what is differentiated at once: one sample in large models, as in AutoRound without its `low_gpu_mem_usage`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from search.scheme import FULL_PRECISION, Scheme
from workers.calibration import sample_count
from workers.evaluator import Evaluator
from workers.loss import has_labels
from workers.sensitivity.backward import micro_batches
from workers.sensitivity.gradient import WITHOUT_LABELS, backward, schemes_of_layers
from workers.sensitivity.path import Path
from workers.sensitivity.table import Entry, Subject, Table, metric, sum_of_layers
from workers.tasks import Compute, Item, Result, Task


@metric("autoscheme")
def autoscheme(compute: Compute, subject: Subject) -> Table:
    """AutoScheme's score of every unit at every allowed scheme; each item is a scheme on a calibration batch."""
    space = subject.space
    schemes = schemes_of_layers(space)
    items: list[Item] = [
        {"scheme": text, "layers": layers, "batch": batch, "seed": 0}
        for text in map(str, space.schemes)
        if (layers := [name for name, allowed in schemes.items() if text in allowed])
        for batch in range(len(subject.batch_sizes))
    ]
    results = compute(SCORES, items)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for item, result in zip(items, results, strict=True):
        for name, batches in result["scores"].items():
            found.setdefault((name, item["scheme"]), []).extend(map(tuple, batches))

    def entry(layer: str, scheme: Scheme) -> Entry:
        if scheme == FULL_PRECISION:
            return Entry(0.0)
        batches = torch.tensor(found[layer, str(scheme)], dtype=torch.float64)
        weight, activation = batches.sum(dim=0).tolist()
        variance = len(batches) * float(batches.sum(dim=1).var()) if len(batches) > 1 else 0.0
        return Entry(weight, activation, variance)

    labelled = all(result["labelled"] for result in results)
    return Table.of(space, sum_of_layers(entry), {"labelled": labelled}, [] if labelled else [WITHOUT_LABELS])


def _scores(evaluator: Evaluator, item: Item) -> Result:
    evaluator.apply({})
    scheme = Scheme.parse(item["scheme"])
    scores: dict[str, list[list[float]]] = {name: [] for name in item["layers"]}

    def visit_weight(name: str, gradient: Tensor) -> None:
        change = evaluator.weight(name, scheme) - evaluator.layers[name].weight
        scores[name][-1][0] += _absolute_sum(gradient, change)

    def visit_input(name: str, gradient: Tensor, change: Tensor) -> None:
        scores[name][-1][1] += _absolute_sum(gradient, change)

    generator = torch.Generator(evaluator.loaded.device).manual_seed(item["seed"] * 100_003 + item["batch"])
    path = Path(evaluator, item["layers"], scheme)
    path.t = 1.0
    with path.walked(visit_weight, visit_input):
        for batch, _ in micro_batches(evaluator, item["batch"]):
            for batches in scores.values():
                batches.append([0.0, 0.0])
            backward(evaluator, batch, generator, of=sample_count(batch))
    labelled = has_labels(evaluator.loaded.task, evaluator.batches("calibration")[item["batch"]])
    return {"labelled": labelled, "scores": scores}


def _absolute_sum(gradient: Tensor, change: Tensor) -> float:
    return float((gradient.float() * change.float()).abs().sum(dtype=torch.float64))


SCORES = Task("autoscheme", 2, _scores)
"""Item: a scheme, the layers that take it, a batch, a seed. Result: whether there were labels, and layer → for each
batch that was differentiated at once, the scores of its weight and its input."""
