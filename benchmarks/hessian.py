"""What a Hessian-trace probe costs: of 10 and of 210 layers of equal size together, and of real models.

Processor seconds on one thread: unlike those on the clock, they leave out what other programs do meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.report import table, write
from scripts.demo_model import folder
from scripts.fetch_models import SMOLLM2, cache_folder
from search.request import Calibration
from workers.calibration import Data
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.models import LoadedModel
from workers.sensitivity import hessian_trace, hessian_trace_labels
from workers.tasks import Task

WIDTH = 256
ROWS = 256
REPEATS = 3
PROBES = {"divergence": hessian_trace.PROBE, "labels": hessian_trace_labels.PROBE}


class Stack(nn.Module):
    """Linear layers with rectifiers between them, from `widths[0]` features on, over a row of pixels."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.config = SimpleNamespace(image_size=(1, widths[0]), num_channels=1)

    def forward(self, images: Tensor) -> Tensor:
        """Rows × features."""
        x = images.flatten(1)
        for layer in self.layers:
            x = layer(x.relu())
        return x


def main() -> None:
    """Time the probes and write the tables."""
    torch.set_num_threads(1)
    # 10 × (3·7) = 210 × (1·1): as many weights, and as many multiplications a row.
    shapes = {10: [3 * WIDTH, 7 * WIDTH] * 5 + [3 * WIDTH], 210: [WIDTH] * 211}
    stacks: list[dict[str, object]] = []
    for layers, widths in shapes.items():
        evaluator = stack(widths)
        times = {loss: seconds_of(task, evaluator, ROWS, 1) for loss, task in PROBES.items()}
        stacks.append(
            {
                "layers": layers,
                "weights": sum(layer.layer.weights for layer in evaluator.layers.values()),
                "forward pass, s": forward_seconds(evaluator, ROWS),
                **{f"probe ({loss}), s": value for loss, value in times.items()},
            }
        )
    ratios = {column: stacks[1][column] / stacks[0][column] for column in list(stacks[0])[2:]}  # type: ignore[operator]
    rows = [row for name, (evaluator, samples, tasks) in real_models().items()
            for row in times_of(name, evaluator, samples, tasks)]  # fmt: skip
    write(
        "hessian",
        "What a probe of the Hessian trace costs",
        "make bench-hessian",
        [
            f"Two random stacks of linear layers with the same number of weights and of multiplications, {ROWS} rows, "
            f"one probe of all layers. Everywhere processor seconds on one thread, the least of {REPEATS} runs.",
            table(stacks),
            "210 layers ÷ 10 layers: "
            + ", ".join(f"{column[:-3]} {ratio:.2f}" for column, ratio in ratios.items())
            + ".",
            "Real models, all layers, one item: its probes share a graph of the samples. MiniLM: 2 × 256 tokens; "
            "SmolLM2-135M, which is large: 1 × 256 tokens, its activations computed again going backwards for the "
            "divergence.",
            table(rows),
        ],
    )


def stack(widths: list[int]) -> Evaluator:
    """A random stack with random data."""
    torch.manual_seed(0)
    model = Stack(widths).eval().requires_grad_(False)
    batch = {
        "pixel_values": torch.randn(ROWS, 1, 1, widths[0]),
        "labels": torch.randint(0, widths[-1], (ROWS,)),
    }
    loaded = LoadedModel(model, "image-classification", "Stack", "random")
    return Evaluator(loaded, Data([batch], [batch], [batch], "random"))


def real_models() -> dict[str, tuple[Evaluator, int, dict[str, Task]]]:
    """Evaluator, samples of an item, and what can be probed: an embedding has no labels."""
    calibration = Calibration(dataset="python-docs", samples=8, sequence_length=256)
    minilm = Evaluator.build(EvaluatorSpec(str(folder()), calibration))
    smollm2 = Evaluator.build(EvaluatorSpec(str(cache_folder() / SMOLLM2.filename), calibration))
    return {
        "MiniLM": (minilm, 2, {"divergence": hessian_trace.PROBE}),
        "SmolLM2-135M": (smollm2, 1, PROBES),
    }


def times_of(name: str, evaluator: Evaluator, samples: int, tasks: dict[str, Task]) -> list[dict[str, object]]:
    """Of items with one and with two probes."""
    forward = forward_seconds(evaluator, samples)
    rows: list[dict[str, object]] = []
    for loss, task in tasks.items():
        for probes in (1, 2):
            seconds = seconds_of(task, evaluator, samples, probes)
            rows.append(
                {
                    "model": name,
                    "loss": loss,
                    "layers": len(evaluator.layers),
                    "probes": probes,
                    "forward pass, s": forward,
                    "item, s": seconds,
                    "forward passes": seconds / forward,
                    "forward passes a probe": seconds / forward / probes,
                }
            )
    return rows


def seconds_of(task: Task, evaluator: Evaluator, samples: int, probes: int) -> float:
    """Of an item with all layers' weights."""
    item = {"batch": 0, "start": 0, "samples": samples, "seeds": list(range(probes)),
            "layers": list(evaluator.layers), "inputs": [], "activation_bits": []}  # fmt: skip
    return least(lambda: task.run(evaluator, item))


def forward_seconds(evaluator: Evaluator, samples: int) -> float:
    """Of the same samples, without derivatives."""
    batch = {key: value[:samples] for key, value in evaluator.batches("calibration")[0].items()}
    with torch.no_grad():
        return least(lambda: evaluator.loaded(batch))


def least(run: Callable[[], object]) -> float:
    """Processor seconds of the cheapest of some runs, after one to warm up."""
    run()
    times = []
    for _ in range(REPEATS):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    print(", ".join(f"{seconds:.3g}" for seconds in times), flush=True)
    return min(times)


if __name__ == "__main__":
    main()
