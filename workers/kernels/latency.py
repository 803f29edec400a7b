"""What products by packed weights take on this device; `python -m workers.kernels.latency` writes a profile of them.

A weight comes from memory, as where a model's other layers have run since: copies of it take turns, and the last cache
is emptied before the first. w16a16 is torch's own product in the type of the tokens. Tokens are rounded, where the
scheme says so, within the time; there is no bias.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from search.errors import BitfrontierError
from search.latency_profile import LatencyProfile, Product, Shape, Times, write_profile
from search.scheme import FULL_PRECISION, Scheme
from workers.kernels.backend import BACKENDS, choose, matmul
from workers.kernels.errors import KernelError, refused
from workers.kernels.pack import ACTIVATION_BITS, GROUP_SIZES, WEIGHT_BITS, Packed, check_scheme, check_shape, pack
from workers.kernels.stopwatch import CACHES, Call, Stopwatch, stopwatch

COPIES = (4, 256)
"""Fewest and most of a weight; between them, as many as take three times the last cache."""

SCHEMES = (
    *sorted(Scheme(w, a, group) for w in WEIGHT_BITS for a in ACTIVATION_BITS for group in GROUP_SIZES),
    FULL_PRECISION,
)
"""All that can be measured."""


@dataclass(frozen=True, slots=True)
class Bench:
    """A device and the backend that multiplies on it, with tokens of type `dtype`."""

    device: torch.device
    backend: str
    dtype: torch.dtype
    watch: Stopwatch

    @classmethod
    def on(cls, name: str, backend: str | None = None) -> Bench:
        """The device of that name, and the best backend there unless one is named.

        Raises KernelError where there is no such device or backend.
        """
        device = _device(name)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        chosen = choose(_random(Shape(64, 128, 1), Scheme(8), device), 1, dtype, backend)
        used = next(name for name, one in BACKENDS.items() if one is chosen)
        return cls(device, used, dtype, stopwatch(device))

    def profile(self) -> LatencyProfile:
        """The profile of this device and backend, in which nothing is measured yet."""
        return LatencyProfile(
            device=device_name(self.device),
            driver=f"{_driver(self.device)}, torch {torch.__version__}",
            backend=self.backend,
            sources=sources_digest(),
            dtype=str(self.dtype).removeprefix("torch."),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @torch.no_grad()
    def measure(self, shape: Shape, scheme: Scheme) -> Times:
        """What a product takes. Raises KernelError where the backend cannot compute it, or memory does not suffice."""
        try:
            calls = self._calls(shape, scheme)
            return Times(self.watch.replayed(calls), self.watch.cold(calls))
        except torch.OutOfMemoryError as error:
            detail = f"{shape} in {scheme} take more memory than {self.device} has"
            raise KernelError(detail, field="shape", value=str(shape)) from error

    def _calls(self, shape: Shape, scheme: Scheme) -> list[Call]:
        """The same product by each copy of a weight."""
        if scheme != FULL_PRECISION:
            check_scheme(scheme)
            check_shape(scheme, shape.rows, shape.columns)
        x = torch.randn(shape.tokens, shape.columns, device=self.device).to(self.dtype)
        if scheme == FULL_PRECISION:
            weight = torch.randn(shape.rows, shape.columns, device=self.device).to(self.dtype)
            return [partial(functional.linear, x, weight.clone()) for _ in range(self._copies(weight.nbytes))]
        packed = _random(shape, scheme, self.device)
        choose(packed, shape.tokens, self.dtype, self.backend)
        copies = [
            replace(packed, tiles=packed.tiles.clone(), scales=packed.scales.clone())
            for _ in range(self._copies(packed.tiles.nbytes))
        ]
        return [partial(matmul, x, copy, None, self.backend) for copy in copies]

    def _copies(self, weight_bytes: int) -> int:
        least, most = COPIES
        return min(max(1 + CACHES * self.watch.cache_bytes // weight_bytes, least), most)


def measured(
    bench: Bench,
    shapes: Iterable[Shape],
    schemes: Sequence[Scheme],
    done: Callable[[Product, Times | KernelError], None],
) -> None:
    """Time every product of the shapes; `done` hears of each as it is measured or refused."""
    for shape in shapes:
        for scheme in sorted(schemes):
            found: Times | KernelError
            try:
                found = bench.measure(shape, scheme)
            except KernelError as error:
                found = error
            done((shape, scheme), found)


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def sources_digest() -> str:
    """SHA-256 of the sources of the kernels and of what launches them."""
    folder, total = Path(__file__).parent, hashlib.sha256()
    for path in sorted([*folder.glob("*.py"), *folder.glob("cuda/*.cuh")]):
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _device(name: str) -> torch.device:
    accepted = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    full = "cuda:0" if name == "cuda" else name
    if full not in accepted:
        raise refused("device", name, accepted)
    return torch.device(full)


def _random(shape: Shape, scheme: Scheme, device: torch.device) -> Packed:
    """A weight of random codes: how much power a product takes depends on them."""
    half = 2 ** (scheme.weight_bits - 1)
    codes = torch.randint(-half, half, (shape.rows, shape.columns), dtype=torch.int8, device=device)
    groups = shape.columns // (scheme.group_size or shape.columns)
    return pack(codes, torch.full((shape.rows, groups), 2.0**-6, device=device), scheme)


def _driver(device: torch.device) -> str:
    """Of a GPU, its driver's version; of a CPU, how many threads compute."""
    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return f"CUDA {torch.version.cuda}"


def main() -> int:
    """Parse the command line; 0 on success, 1 with a plain message otherwise."""
    parser = argparse.ArgumentParser(prog="python -m workers.kernels.latency", description=__doc__)
    parser.add_argument("shapes", nargs="+", metavar="ROWSxCOLUMNS", help="of the weights: 4096x14336")
    parser.add_argument("--tokens", type=int, action="append", help="multiplied at once; may stand several times")
    parser.add_argument("--schemes", help="separated by commas; left out: all that the kernels know")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    try:
        bench = Bench.on(arguments.device)
        asked = [Scheme.parse(text) for text in arguments.schemes.split(",")] if arguments.schemes else SCHEMES
        shapes = [Shape(*_sizes(text), tokens) for tokens in arguments.tokens or [1] for text in arguments.shapes]
    except BitfrontierError as error:
        print(error.detail, file=sys.stderr)
        return 1
    times: dict[Product, Times] = {}

    def done(product: Product, found: Times | KernelError) -> None:
        shape, scheme = product
        if isinstance(found, KernelError):
            print(f"{scheme} of {shape} left out: {found.detail}", file=sys.stderr)
        else:
            times[product] = found
            print(f"{scheme} of {shape}: {found.replayed.p50:g} µs", file=sys.stderr)

    measured(bench, shapes, [*{*asked, FULL_PRECISION}], done)
    print(write_profile(replace(bench.profile(), times=times)), end="")
    return 0


def _sizes(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise refused("shape", text, "ROWSxCOLUMNS, such as 4096x14336")
    return int(rows), int(columns)


if __name__ == "__main__":
    sys.exit(main())
