"""CUDA C++ to machine code by NVRTC: needs CuPy, but no GPU and no header of CUDA's.

CuPy's own way from source to module asks the device, adds `-ftz=true`, which rounds otherwise than the reference, and
never picks sm_90a; so the machine code is made here and CuPy only loads it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.kernels.errors import KernelError

SOURCES = Path(__file__).parent / "cuda"

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a")

_OWN_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)

_FUNCTION = re.compile(
    r"Function properties for (\w+)\n"
    r"\D+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r"ptxas info\s+: Used (\d+) registers"
)

_WARNING = re.compile(r"^.*(?:\bwarning\b|\(C\d+\)).*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Resources:
    """What ptxas gave one kernel: registers a thread at entry, bytes of stack and of spilled registers."""

    registers: int
    stack_bytes: int
    spill_bytes: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """Machine code (an ELF file), the resources of every kernel in it, and the compilers' warnings."""

    cubin: bytes
    resources: Mapping[str, Resources]
    warnings: tuple[str, ...]


def compile_source(text: str, architecture: str) -> Compiled:
    """Compile a program for `architecture`; its `#include "…"` are our own sources.

    Raises KernelError with the compiler's log, or where there is no compiler.
    """
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(inlined(text), "kernels.cu", (), ())
    try:
        nvrtc.compileProgram(program, options(architecture))
        # getCUBIN takes the last byte for the end of a string.
        return _compiled(nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program))
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise KernelError(f"{error} for {architecture}:\n{log}", field="architecture", value=architecture) from error
    finally:
        nvrtc.destroyProgram(program)


def load_module(text: str, architecture: str) -> Any:
    """The program as a `cupy.RawModule` on the present device; its machine code is kept in CuPy's cache folder.

    Where that cannot be written, it is kept until this process ends. Raises KernelError as `compile_source`.
    """
    import cupy

    name = f"bitfrontier-{key(text, architecture)}.cubin"
    path = _cache_folder() / name
    if not os.access(path, os.R_OK):
        cubin = compile_source(text, architecture).cubin
        try:
            write_at_once(path, cubin)
        except OSError:
            path = Path(_temporary_folder().name) / name
            write_at_once(path, cubin)
    return cupy.RawModule(path=str(path))


def key(text: str, architecture: str) -> str:
    """Names the machine code of a program: a digest of all its text, the options and the compiler."""
    parts = (inlined(text), architecture, *_FLAGS, str(_nvrtc().getVersion()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def inlined(text: str) -> str:
    """The text with every `#include "…"` replaced by that source, the first time it occurs."""
    seen: set[str] = set()

    def resolve(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        return _OWN_INCLUDE.sub(resolve, (SOURCES / name).read_text().replace("#pragma once\n", ""))

    return _OWN_INCLUDE.sub(resolve, text)


_FLAGS = (
    "--std=c++17",
    "--fmad=false",  # a sum and a product each round, as in the reference; fmaf is written where it is meant
    "--device-as-default-execution-space",
    "--diag-suppress=177",  # a constant that this program does not use
    "--ptxas-options=-v",
)


def options(architecture: str) -> tuple[str, ...]:
    """NVRTC's options: machine code for exactly this architecture, IEEE arithmetic, ptxas's report in the log."""
    if architecture not in ARCHITECTURES:
        raise KernelError(
            f"no kernels for {architecture}", field="architecture", value=architecture, accepted=ARCHITECTURES
        )
    return (f"-arch={architecture}", *_FLAGS)


def write_at_once(path: Path, content: bytes) -> None:
    """Write a file that another process may read at any time. Raises OSError, and leaves nothing behind then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        written = Path(file.name)
        try:
            file.write(content)
            file.flush()
            written.replace(path)
        except OSError:
            written.unlink()
            raise


def _compiled(cubin: bytes, log: str) -> Compiled:
    resources = {
        name: Resources(registers=int(registers), stack_bytes=int(stack), spill_bytes=int(stores) + int(loads))
        for name, stack, stores, loads, registers in _FUNCTION.findall(log)
    }
    return Compiled(cubin, resources, tuple(_WARNING.findall(log)))


def _cache_folder() -> Path:
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Of this process alone: what others could write would be run."""
    return tempfile.TemporaryDirectory(prefix="bitfrontier-")


def _nvrtc() -> Any:
    """The compiler. CuPy looks for its library only when it is first asked something."""
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        raise KernelError(f"kernels cannot be compiled: {error}", field="compiler", value="NVRTC") from error
    return nvrtc
