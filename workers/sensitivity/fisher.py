"""Fisher diagonal: half the mean squared gradient of every weight times its squared rounding error.

    ΔL_l(s) ≈ ½ Σ_j E[G_j²]·(Q_s(W_l) − W_l)_j²

of which only interactions between weights are missing: the saliency of Optimal Brain Damage (LeCun et al., 1989) with
the Fisher diagonal for the Hessian's, as in Fisher pruning (Theis et al., 1801.05787). Activations alike:
½ Σ E[g_x²·(Q(x) − x)²] over the elements of the layer's input x, g_x being its gradient through this layer alone.
`sampled` describes G.
"""

from __future__ import annotations

import numpy as np

from search.scheme import Scheme
from search.space import Unit
from workers.sensitivity.rounding import weight_only
from workers.sensitivity.sampled import joined, sampled, sum_of
from workers.sensitivity.table import Entry, Subject, Table, metric, variance_of_mean
from workers.tasks import Compute


@metric("fisher")
def fisher(compute: Compute, subject: Subject) -> Table:
    """Predicted loss increase of every unit at every allowed scheme, from one backward pass.

    The standard error is that of the mean over the micro-batches, as if each were drawn anew with its labels. What a
    micro-batch says of a layer's weight is taken as its ‖G‖² times the mean over all of ½ Σ G²·Δ² / ‖G‖²: squares of
    single weights are summed up at once. Layers of a unit, and its weights and activations, vary together.
    """
    results = sampled(compute, subject, "fisher")
    sizes = np.concatenate([result["fisher"]["sizes"] for result in results]).astype(float)
    shards = np.array([sum(result["fisher"]["sizes"]) for result in results], dtype=float)
    squares = {layer: found["norm"] for layer, found in joined(results, "fisher", "squares").items()}
    weights, inputs = joined(results, "fisher", "weights"), joined(results, "fisher", "inputs")
    by_micro_batch = {
        layer: {
            text: np.average(means, weights=shards)
            * squares[layer]
            / max(np.average(squares[layer], weights=sizes), 1e-300)
            for text, means in found.items()
        }
        for layer, found in weights.items()
    }

    def entry(unit: Unit, scheme: Scheme) -> Entry:
        weight = np.zeros(len(sizes)) + sum_of(unit, by_micro_batch, weight_only(scheme))
        activation = np.zeros(len(sizes)) + sum_of(unit, inputs, f"a{scheme.activation_bits}")
        return Entry(
            float(np.average(weight, weights=sizes)),
            float(np.average(activation, weights=sizes)),
            float(variance_of_mean(weight + activation, sizes)),
        )

    return Table.of(subject.space, entry, {"micro_batches": len(sizes)})
