"""Every kernel against torch, Triton, cuBLASLt and Humming, checked and timed on the GPU at hand.

`python -m benchmarks.kernels` needs torch, CuPy, NumPy and, for that rival, Triton. Cells (a shape, a number of tokens)
come by importance; what a deadline leaves out is named. Ratios are of one run: clocks differ from one to the next.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.rivals import BASE, INT8, RIVALS, Unavailable
from benchmarks.kernels.timing import Run, Stopwatch, Times, random_codes
from search.scheme import Scheme
from workers.kernels import autotune, launch, reference
from workers.kernels.backend import choose
from workers.kernels.catalogue import Kernel, Prefill, program, quantise
from workers.kernels.compile import load_module
from workers.kernels.errors import KernelError
from workers.kernels.pack import Packed, pack
from workers.kernels.plans import Plan, Problem, candidates

RESULTS = Path(__file__).parents[1] / "results"

SHAPES = {
    (8192, 8192): "square, and the q and o projections of LLaMA-2-70B",
    (4096, 4096): "square",
    (28672, 8192): "gate and up projections of LLaMA-2-70B",
    (8192, 28672): "down projection of LLaMA-2-70B",
    (1024, 8192): "k and v projections of LLaMA-2-70B",
    (14336, 4096): "gate and up projections of an 8B model",
    (4096, 14336): "down projection of an 8B model",
}
"""N × K: output channels × inputs."""

TOKENS = (1, 4096, 16, 512, 8, 64)

TUNED = ("w6a16", "w6a8", "w4a16", "w4a8")
"""Schemes whose plans are timed first; the others take their defaults."""

OTHERS = ("w8a8", "w4a4", "w4a16g128", "w4a8g128", "w6a8g64", "w5a8", "w3a16")

LAYOUTS = ("ROWS", "TILES", "NIBBLES")

CHECKED_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Goal:
    """What a scheme should be over float16: times as fast, at least and at best, and beside what else."""

    scheme: str
    tokens: int
    floor: float
    goal: float
    of_bandwidth: float = 0
    of_int8: float = 0


GOALS = (
    Goal("w6a16", 1, 1.8, 2.2, of_bandwidth=0.85),
    Goal("w6a8", 1, 1.8, 2.2, of_bandwidth=0.85),
    Goal("w4a16", 1, 2.2, 3.0),
    Goal("w4a8", 1, 2.2, 3.0),
    Goal("w6a8", 4096, 1.2, 1.65, of_int8=0.85),
    Goal("w4a8", 4096, 1.2, 1.8),
)
"""For 8192 × 8192, replayed in a graph."""


@dataclass(frozen=True, slots=True)
class Row:
    """A method's times in a cell; for ours, the plan, what it moves of the copy bandwidth, and how its check went."""

    rows: int
    columns: int
    tokens: int
    method: str
    graph_us: float
    cold_us: float
    tops: float
    over_fp16: float | None
    of_copy_bandwidth: float | None = None
    plan: str | None = None
    check: str | None = None


@dataclass
class Bench:
    """A run over the cells until the deadline."""

    deadline: float
    watch: Stopwatch = field(default_factory=Stopwatch)
    rows: list[Row] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    copy_bandwidth: float = 0

    def run(self, cells: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """Measure cell by cell; those that are left out, or not whole, are returned."""
        self.copy_bandwidth = self.watch.copy_bandwidth()
        print(f"copy bandwidth {self.copy_bandwidth / 1e12:.2f} TB/s, read and written")
        precompile()
        for index, cell in enumerate(cells):
            whole = self._cell(*cell)
            self._print(*cell)
            if not whole:
                return cells[index:]
        return []

    def _cell(self, rows: int, columns: int, tokens: int) -> bool:
        """Whether all methods were measured, before the deadline and while the device answered."""
        for method in (*RIVALS, *ours()):
            if time.monotonic() > self.deadline:
                return False
            try:
                self._measure(rows, columns, tokens, method)
            except RuntimeError as error:
                self.failed.append(f"the device stopped at {method} {tokens} × {rows} × {columns}: {error}")
                return False
        return True

    def _measure(self, rows: int, columns: int, tokens: int, method: str) -> None:
        try:
            if method in RIVALS:
                self._record(rows, columns, tokens, method, self._timed(RIVALS[method], tokens, rows, columns))
            else:
                self._ours(rows, columns, tokens, method)
        except Unavailable as reason:
            self.unavailable.setdefault(method, str(reason))
        except Exception as error:
            # A rival may refuse, our kernels must not.
            what = f"{type(error).__name__}: {error}"
            if method in RIVALS:
                self.unavailable.setdefault(f"{method} {tokens} × {rows} × {columns}", what)
            else:
                self.failed.append(f"{method} {tokens} × {rows} × {columns}: {what}")
            # After some errors nothing runs any more: then this raises it again.
            torch.cuda.synchronize()

    def _timed(self, rival: Any, tokens: int, rows: int, columns: int) -> Times:
        return self.watch.times(rival(self.watch, tokens, rows, columns))

    def _ours(self, rows: int, columns: int, tokens: int, method: str) -> None:
        text, _, of_codes = method.partition(" ")
        packed = random_weight(Scheme.parse(text), rows, columns)
        x = torch.randn(tokens, columns, dtype=torch.float16, device="cuda")
        choose(packed, tokens, x.dtype, "cupy")
        if text in TUNED and not of_codes:
            launch.tune(packed, tokens, x.dtype)
        plan = autotune.chosen(launch.problem(packed, tokens, x.dtype))
        wrong = check(plan, x, packed)
        if wrong is not None:
            self.failed.append(f"{method} {tokens} × {rows} × {columns}: {wrong}")
        runs = products_of_codes(plan, x, packed) if of_codes else products(plan, x, packed)
        times = self.watch.times(runs)
        moved = packed.tiles.nbytes + packed.scales.nbytes + x.nbytes + 2 * tokens * rows
        bandwidth = moved / (times.graph * 1e-6) / self.copy_bandwidth
        described = f"{plan.kernel.name}, {plan.slices} slices" if plan.slices > 1 else plan.kernel.name
        self._record(rows, columns, tokens, method, times, bandwidth, described, wrong or "equal")

    def _record(self, rows: int, columns: int, tokens: int, method: str, times: Times, *details: Any) -> None:
        base = times.graph if method == BASE else self.of(rows, columns, tokens, BASE)
        tops = 2 * rows * columns * tokens / times.graph / 1e6
        over = base / times.graph if base else None
        self.rows.append(Row(rows, columns, tokens, method, times.graph, times.cold, tops, over, *details))

    def of(self, rows: int, columns: int, tokens: int, method: str) -> float | None:
        """Microseconds of a method in a cell, where it was measured."""
        cell = rows, columns, tokens, method
        found = (row.graph_us for row in self.rows if (row.rows, row.columns, row.tokens, row.method) == cell)
        return next(found, None)

    def _print(self, rows: int, columns: int, tokens: int) -> None:
        print(f"\n{tokens} tokens × {rows} × {columns}, {SHAPES[rows, columns]}")
        print(f"{'':16}{'graph µs':>10}{'cold µs':>10}{'TOPS':>8}{'× fp16':>8}{'of copy':>9}")
        for row in self.rows:
            if (row.rows, row.columns, row.tokens) == (rows, columns, tokens):
                over = f"{row.over_fp16:8.2f}" if row.over_fp16 else f"{'–':>8}"
                copy = f"{row.of_copy_bandwidth:9.0%}" if row.of_copy_bandwidth and tokens <= 64 else f"{'':9}"
                print(f"{row.method:16}{row.graph_us:10.1f}{row.cold_us:10.1f}{row.tops:8.0f}{over}{copy}", flush=True)


def ours() -> tuple[str, ...]:
    """Our methods, the important ones first: schemes, and of some the product alone, of tokens rounded before."""
    return (*TUNED, "w6a8 codes", "w4a8 codes", *OTHERS)


def cells() -> list[tuple[int, int, int]]:
    """N, K and tokens: all tokens of the first shape, then the others' by tokens."""
    first, *others = SHAPES
    return [(*first, tokens) for tokens in TOKENS] + [(*shape, tokens) for tokens in TOKENS for shape in others]


def random_weight(scheme: Scheme, rows: int, columns: int) -> Packed:
    """Random codes and scales, packed on the GPU."""
    scales = torch.rand(rows, columns // (scheme.group_size or columns), device="cuda") / 1024
    return pack(random_codes(rows, columns, scheme.weight_bits), scales.half(), scheme)


def products(plan: Plan, x: torch.Tensor, packed: Packed) -> list[Run]:
    """The whole product, rounding of tokens included, with each of the rotated weights."""
    launch.multiply(plan, x, packed, None)
    return [partial(launch.multiply, plan, x, copy, None) for copy in launch.rotation(packed)]


def products_of_codes(plan: Plan, x: torch.Tensor, packed: Packed) -> list[Run]:
    """The product alone, of tokens rounded before."""
    layout = plan.kernel.layout if isinstance(plan.kernel, Prefill) else "ROWS"
    codes, scales = launch.quantize(x, packed, layout, launch.padded_tokens(plan, len(x)))
    output = x.new_empty(len(x), packed.rows)
    launch.product(plan, codes, scales, packed, None, output)
    return [partial(launch.product, plan, codes, scales, copy, None, output) for copy in launch.rotation(packed)]


def check(plan: Plan, x: torch.Tensor, packed: Packed) -> str | None:
    """What is wrong with a product: of some of its tokens every bit for integers, for floats the relative error."""
    found = launch.multiply(plan, x, packed, None)
    if not found.isfinite().all():
        return "not all results are finite"
    some = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_TOKENS), device="cuda").long()
    some_x, found = x[some].contiguous(), found[some]
    if packed.scheme.quantizes_activations:
        warps = getattr(plan.kernel, "warps", 1)
        expected = reference.matmul(some_x, packed, slices=plan.slices, warps=warps)
        different = int((found != expected).sum())
        return f"{different} of {found.numel()} results differ from the reference's" if different else None
    expected = reference.matmul(some_x, packed, out_dtype=torch.float32)
    error = float((found.float() - expected).norm() / expected.norm())
    return None if error < 1e-3 else f"relative error {error:.1e}"


def precompile() -> None:
    """Compile on all cores what the cells will ask for: cells are timed one after the other."""
    machine, dtype = launch.machine(torch.device("cuda", 0)), torch.float16
    kernels: dict[str, Kernel] = {kernel.name: kernel for kernel in (quantise(layout, dtype) for layout in LAYOUTS)}
    for text, (rows, columns, tokens) in product((*TUNED, *OTHERS), cells()):
        plans = candidates(Problem(machine, Scheme.parse(text), rows, columns, tokens, dtype))
        kernels |= {plan.kernel.name: plan.kernel for plan in (plans if text in TUNED else plans[:1])}
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kernel: load_module(program([kernel]), machine.architecture), kernels.values()))
    print(f"{len(kernels)} kernels compiled in {time.monotonic() - began:.0f} s")


def judged(bench: Bench) -> Iterator[str]:
    """A line for every goal that was measured."""
    for goal in GOALS:
        row = next(
            (
                row
                for row in bench.rows
                if (row.rows, row.columns, row.tokens, row.method) == (8192, 8192, goal.tokens, goal.scheme)
            ),
            None,
        )
        if row is None or row.over_fp16 is None:
            yield f"{goal.scheme} {goal.tokens:5}: not measured"
            continue
        verdict = "goal met" if row.over_fp16 >= goal.goal else "floor met" if row.over_fp16 >= goal.floor else "MISSED"
        line = f"{goal.scheme:6} {goal.tokens:5} tokens: {row.over_fp16:.2f}× fp16"
        line += f" (floor {goal.floor}, goal {goal.goal}): {verdict}"
        if goal.of_bandwidth and row.of_copy_bandwidth:
            line += f"; {row.of_copy_bandwidth:.0%} of the copy bandwidth (goal {goal.of_bandwidth:.0%})"
        if goal.of_int8:
            times = [bench.of(8192, 8192, goal.tokens, rival) for rival in INT8]
            best = min((took for took in times if took), default=None)
            line += f"; {best / row.graph_us:.2f}× the best int8 (goal {goal.of_int8})" if best else "; no int8 rival"
        yield line


def write(bench: Bench, left_out: list[tuple[int, int, int]], goals: list[str]) -> Path:
    """The whole run as JSON, named for the device and the day."""
    import cupy

    now = datetime.now(tz=UTC)
    name = torch.cuda.get_device_name()
    content = {
        "device": name,
        "date": now.isoformat(timespec="seconds"),
        "machine": asdict(launch.machine(torch.device("cuda", 0))),
        "versions": {"torch": torch.__version__, "cupy": cupy.__version__, "cuda": torch.version.cuda},
        "kernels": autotune.sources_digest(),
        "copy_bytes_per_second": bench.copy_bandwidth,
        "goals": goals,
        "failed": bench.failed,
        "unavailable": bench.unavailable,
        "left_out": left_out,
        "rows": [asdict(row) for row in bench.rows],
    }
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"kernels-{slug}-{now.date().isoformat()}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def main() -> int:
    """Run, print, write; 1 where there is no GPU or a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9, help="when to stop (9)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.kernels needs a CUDA device, and there is none: nothing was measured", file=sys.stderr)
        return 1
    try:
        choose(random_weight(Scheme(6, 8), 64, 128), 1, torch.float16, "cupy")
    except KernelError as error:
        print(f"nothing was measured: {error}", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    bench = Bench(deadline=time.monotonic() + 60 * arguments.minutes)
    left_out = bench.run(cells())
    goals = list(judged(bench))
    path = write(bench, left_out, goals)
    for method, reason in bench.unavailable.items():
        print(f"not measured: {method}: {reason.splitlines()[0]}")
    if left_out:
        print("left out at the deadline:", ", ".join(f"{m} × {n} × {k}" for n, k, m in left_out))
    for failure in bench.failed:
        print(f"FAILED: {failure}")
    print(f"\n8192 × 8192, in one run ({path.name}):", *goals, sep="\n  ")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
