"""Kernels on a CPU: their own text, compiled by g++ over the emulator's primitives, called from Python."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

from workers.kernels.errors import KernelError, refused

EMULATOR = Path(__file__).parent
SOURCES = EMULATOR.parent / "cuda"

SHARED_BYTES = 227 * 1024
"""The most dynamic shared memory that a CTA may have on any architecture."""

FLAGS = (
    "-std=c++17",
    "-O1",
    "-ffp-contract=off",  # each product and each sum rounds, as on the GPU
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",  # which forbids jumps between stacks
    "-shared",
    "-fPIC",
    "-DBITFRONTIER_EMULATOR",
    f"-I{EMULATOR}",
    f"-I{SOURCES}",
)

_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(')


class _Grid(ctypes.Structure):
    _fields_ = (
        ("blocks_x", ctypes.c_int32),
        ("blocks_y", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
        ("reverse", ctypes.c_int32),
        ("arguments", ctypes.c_int32),
    )


class Emulated:
    """The kernels of a program: every `extern "C" __global__ void name(…)` of its text, as NVRTC would compile it."""

    def __init__(self, text: str, cache: Path | None = None) -> None:
        """Compile `text`, or load what was compiled from it before, in the folder `cache`.

        Raises KernelError with g++'s messages, or where there is no g++.
        """
        self._library = ctypes.CDLL(str(_built(_program(text), cache or _cache_folder())))

    def launch(
        self,
        name: str,
        blocks: tuple[int, int],
        threads: int,
        *arguments: Tensor | int | None,
        shared_bytes: int = SHARED_BYTES,
        reverse: bool = False,
    ) -> None:
        """Run a kernel on a grid of `blocks` CTAs (x, y), on tensors of the CPU, integers and null pointers.

        `shared_bytes` of dynamic shared memory may be written. `reverse` runs CTAs and threads from the last to the
        first, where that must make no difference.
        Raises KernelError where a GPU would hang, fault or compute something undefined.
        """
        values = (ctypes.c_uint64 * len(arguments))(*(_value(argument) for argument in arguments))
        entry = self._library[f"emulate_{name}"]
        entry.restype = ctypes.c_char_p
        error = entry(ctypes.byref(_Grid(*blocks, threads, shared_bytes, reverse, len(values))), values)
        if error is not None:
            raise KernelError(f"{name}: {error.decode()}", field="kernel", value=name)


def _program(text: str) -> str:
    entries = (
        f'extern "C" const char* emulate_{name}(const emulator::Grid* grid, const uint64_t* values) '
        f"{{ return emulator::launch({name}, *grid, values); }}"
        for name in _KERNEL.findall(text)
    )
    headers = (f'#include "{path.name}"' for path in sorted(EMULATOR.glob("*.h")))
    return "\n".join([*headers, text, *entries, ""])


def _built(program: str, cache: Path) -> Path:
    """The program's shared library, in a file named for all that it is made of."""
    texts = [path.read_bytes() for folder in (EMULATOR, SOURCES) for path in sorted(folder.glob("*.*h"))]
    digest = hashlib.sha256(b"\0".join([program.encode(), " ".join(FLAGS).encode(), *texts])).hexdigest()
    library = cache / f"{digest}.so"
    if not library.exists():
        compiler = shutil.which("g++")
        if compiler is None:
            raise KernelError("g++ is not installed", field="g++", accepted="a C++17 compiler under this name")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            source, made = Path(folder) / "kernels.cc", Path(folder) / "kernels.so"
            source.write_text(program)
            done = subprocess.run([compiler, *FLAGS, "-o", made, source], capture_output=True, text=True)
            if done.returncode:
                raise KernelError(f"g++ refused the kernels:\n{done.stderr}", field="kernels")
            made.replace(library)
    return library


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitfrontier" / "emulator"


def _value(argument: Tensor | int | None) -> int:
    if isinstance(argument, Tensor):
        if not argument.is_contiguous():
            raise refused("arguments", argument.stride(), "contiguous tensors")
        return argument.data_ptr()
    return 0 if argument is None else argument % 2**64
