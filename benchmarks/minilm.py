"""A full search on all-MiniLM-L6-v2: both metrics, 36 layers × 4 schemes, 20 measured configurations."""

from __future__ import annotations

from benchmarks.report import table, write
from benchmarks.service import Service
from db.models import put_model
from scripts.demo_model import folder

SCHEMES = ["w3a16g64", "w4a16g64", "w6a16g64", "w8a16g64"]


def main() -> None:
    """Run the search and write its frontier."""
    service = Service()
    put_model(service.engine, "minilm", str(folder()), None)
    found = service.search(
        model="minilm",
        space={"schemes": SCHEMES, "ignore": ["embeddings.*"]},
        budgets={"avg_bits": 8.25},
        sensitivity=["hessian_trace", "kl"],
        optimizer={"points": 20, "evaluations": 20},
    )
    rows: list[dict[str, object]] = [
        {
            "candidate": one.label,
            "avg_bits": one.costs["avg_bits"],
            "1 − cosine": one.loss,
            "±": one.metrics["loss_stderr"],
            **{f"{metric} predicted": value for metric, value in one.predicted.items()},
            "on the frontier": "yes" if one.on_frontier else "",
        }
        for one in sorted(found.candidates, key=lambda one: one.costs["avg_bits"])
    ]
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in found.stages.items())
    agreement = (found.search.summary or {})["agreement"]
    ranks = ", ".join(f"{metric} {one['spearman']:.3f}" for metric, one in agreement.items())
    write(
        "minilm",
        "A full search on all-MiniLM-L6-v2",
        "make bench-minilm",
        [
            "36 layers × 4 schemes, `rtn`, metrics `hessian_trace` and `kl` on 32 sequences of up to 256 tokens, "
            f"{len(rows)} configurations measured on 32 others: {found.seconds:.0f} s ({stages}). Rank correlation "
            f"with the measurements: {ranks}.",
            table(rows),
        ],
    )


if __name__ == "__main__":
    main()
