"""Mixed against uniform precision on SmolLM2-135M: symmetric rtn, groups of 64, weights at 2, 3, 4, 6 and 8 bits."""

from __future__ import annotations

import resource
from pathlib import Path

import sklearn
import torch

from benchmarks.report import table, write
from benchmarks.service import Finished, Service
from db.models import put_model
from scripts.fetch_models import SMOLLM2, cache_folder
from search import allocation
from search.request import Calibration
from workers.calibration import load_data
from workers.datasets import datasets_directory
from workers.evaluator import Evaluator
from workers.models import load_model

SCHEMES = ["w2a16g64", "w3a16g64", "w4a16g64", "w6a16g64", "w8a16g64"]
SCALES = 0.25
"""Bits per weight of the 16-bit scales; `avg_bits` counts them, the table's first column does not."""
CODE_BITS = (3.0, 3.5, 4.0, 5.0)
CALIBRATION = {"dataset": "python-docs", "samples": 8, "sequence_length": 256}


def main() -> None:
    """Run the searches, measure their best points on prose that no search has seen, and write the table."""
    source = str(cache_folder() / SMOLLM2.filename)
    service = Service()
    put_model(service.engine, "smollm2-135m", source, None)

    first = search(service, 5.0, points=8, evaluations=12)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    others = {bits: search(service, bits, points=4, evaluations=9) for bits in CODE_BITS if bits != 5.0}
    found = {**others, 5.0: first}

    prose = prose_evaluator(source)
    uniform = {one.label: one for one in first.candidates if one.source == "uniform"}
    rows: list[dict[str, object]] = []
    for bits in CODE_BITS:
        best = found[bits].best
        same = uniform.get(f"uniform w{bits:.0f}a16g64") if bits == int(bits) else None
        rows.append(
            {
                "code bits": f"{bits:.1f}",
                "avg_bits": best.costs["avg_bits"],
                "uniform KL": same.loss if same else float("nan"),
                "mixed KL": best.loss,
                "± (mixed)": best.metrics["loss_stderr"],
                "perplexity": best.metrics["perplexity"],
                "uniform KL, other prose": measure(prose, same.allocation)["loss"] if same else float("nan"),
                "mixed KL, other prose": measure(prose, best.allocation)["loss"],
                "best is": best.label,
            }
        )
    everything: list[dict[str, object]] = [
        {"candidate": one.label, "avg_bits": one.costs["avg_bits"], "measured KL": one.loss, **one.predicted}
        for one in first.candidates
    ]
    summary = first.search.summary or {}
    write(
        "smollm2",
        "Mixed against uniform precision on SmolLM2-135M",
        "make bench-smollm2",
        [
            "KL in nats per token from the full-precision model (the Q4_1 file dequantised to float32; its perplexity "
            f"is {summary['full_precision']['perplexity']:.2f}), symmetric `rtn`, groups of 64, weights only, 210 "
            "layers. Metric `hessian_trace` on 8 × 256 tokens of the Python reference; mixed is the best measured "
            "candidate under the budget, chosen on 8 × 256 held-out tokens, and measured again on 16 × 256 tokens of "
            "scikit-learn's data set descriptions, which no search has seen.",
            table(rows),
            f"The first search (budget 5.25, {len(first.candidates)} measured configurations) took "
            f"{first.seconds:.0f} s ({listed(first.stages, '{} {:.0f} s')}), with a peak of {peak:.2f} GB of memory. "
            f"The others found its sensitivities done and took "
            f"{', '.join(f'{one.seconds:.0f} s' for one in others.values())}.",
            "Measured ÷ predicted of the uniform configurations, which corrects the predictions: "
            f"{listed(summary['correction']['hessian_trace'], '{} {:.2f}')}.",
            table(everything),
        ],
    )


def listed(values: dict[str, float], form: str) -> str:
    """The items of `values` in a sentence."""
    return ", ".join(form.format(name, value) for name, value in values.items())


def search(service: Service, code_bits: float, points: int, evaluations: int) -> Finished:
    """One search with `hessian_trace` under a budget of `code_bits` plus scales."""
    finished = service.search(
        model="smollm2-135m",
        calibration=CALIBRATION,
        space={"schemes": SCHEMES},
        budgets={"avg_bits": code_bits + SCALES},
        sensitivity=["hessian_trace"],
        optimizer={"points": points, "evaluations": evaluations},
    )
    print(f"{code_bits}: {finished.seconds:.0f} s, {finished.best.label}, KL {finished.best.loss:.4g}", flush=True)
    return finished


def prose_evaluator(source: str) -> Evaluator:
    """The model with prose of another kind than it was searched on."""
    texts = sorted((Path(sklearn.__file__).parent / "datasets" / "descr").glob("*.rst"))
    target = datasets_directory() / "prose"
    target.mkdir(parents=True)
    for text in texts:
        (target / f"{text.stem}.txt").write_text(text.read_text(encoding="utf-8"), encoding="utf-8")
    loaded = load_model(source, torch.device("cpu"))
    return Evaluator(loaded, load_data(Calibration(dataset="prose", samples=16, sequence_length=256), loaded))


def measure(evaluator: Evaluator, schemes: dict[str, str]) -> dict[str, float]:
    """The metrics of an allocation on the evaluator's held-out split."""
    return evaluator.measure(allocation.from_json(schemes))


if __name__ == "__main__":
    main()
