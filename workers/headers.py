"""What the headers of weight files say, and whether the file keeps it, before a weight is read.

Every count and offset is held against the file's size first, so that a hostile header costs neither memory nor time.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path

from search.errors import UnsupportedModel

Shapes = dict[str, tuple[int, ...]]
"""Tensor name → shape."""

PICKLE = "a pickle, which can run code when it is loaded"
REFUSED = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"), PICKLE),
    ".npy": "an array that may hold a pickle, which can run code when it is loaded",
    ".npz": "arrays that may hold a pickle, which can run code when it is loaded",
    ".h5": "a Keras file, which can hold code",
    ".keras": "a Keras file, which can hold code",
    ".msgpack": "a Flax file, which holds no model that can be searched",
    ".onnx": "an ONNX graph, which holds no model that can be searched",
    ".tflite": "a TensorFlow Lite graph, which holds no model that can be searched",
}
"""The ending of a weight file that is never read → what is wrong with it."""

ACCEPTED = "weights in .safetensors, or a .gguf file"

MOST_TENSORS = 2**17
MOST_VALUES = 2**21
"""Of a GGUF header. A vocabulary of 262 144 tokens with its merges has 1.3 million values."""

GGUF_MAGIC = b"GGUF"
GGUF_VERSIONS = (2, 3)
GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""A value's type → its bytes."""


def read_safetensors(file: Path, name: str) -> Shapes:
    """The tensors of a safetensors file, which messages call `name`.

    Raises UnsupportedModel when the file is another kind, damaged or truncated.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            return {tensor: tuple(opened.get_slice(tensor).get_shape()) for tensor in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _refused(file, name, str(error)) from error


def read_gguf(file: Path, name: str) -> Shapes:
    """The tensors of a GGUF file, which messages call `name`.

    Raises UnsupportedModel when the file is another kind, damaged, truncated, or has a header out of all proportion.
    """
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _gguf_shapes(_Cursor(content))
    except (ValueError, OSError) as error:
        raise _refused(file, name, str(error)) from error


def _gguf_shapes(cursor: _Cursor) -> Shapes:
    if cursor.take(4) != GGUF_MAGIC:
        raise ValueError("it does not begin as a GGUF file does")
    version, tensors, pairs = cursor.numbers("IQQ")
    if version not in GGUF_VERSIONS:
        raise ValueError(f"it is GGUF version {version}, and versions {GGUF_VERSIONS} can be read")
    _at_most(tensors, MOST_TENSORS, "tensors")
    _at_most(pairs, MOST_VALUES, "settings")
    values, alignment = 0, 32
    for _ in range(pairs):
        key, (kind,) = cursor.text(), cursor.numbers("I")
        if key == b"general.alignment" and kind == 4:
            (alignment,) = cursor.numbers("I")
        else:
            values += _skip_value(cursor, kind)
        _at_most(values, MOST_VALUES, "values in its settings")
    if alignment.bit_count() != 1:
        raise ValueError(f"it is aligned to {alignment} bytes, which is no power of two")
    placed = [_gguf_tensor(cursor) for _ in range(tensors)]
    start = -(-cursor.at // alignment) * alignment
    for tensor, _, offset, length in placed:
        if start + offset + length > cursor.size:
            raise ValueError(f"it ends before its tensor {tensor} does")
    return {tensor: shape for tensor, shape, _, _ in placed}


def _skip_value(cursor: _Cursor, kind: int) -> int:
    """Skip a value; how many values it was."""
    if kind != GGUF_ARRAY:
        _skip_one(cursor, kind)
        return 1
    inner, count = cursor.numbers("IQ")
    _at_most(count, MOST_VALUES, "values in its settings")
    if inner in GGUF_NUMBERS:
        cursor.skip(GGUF_NUMBERS[inner] * count)
    else:
        for _ in range(count):
            _skip_one(cursor, inner)
    return int(count)


def _skip_one(cursor: _Cursor, kind: int) -> None:
    if kind == GGUF_STRING:
        cursor.text()
    elif kind in GGUF_NUMBERS:
        cursor.skip(GGUF_NUMBERS[kind])
    else:
        raise ValueError(f"a value of its settings has the unknown type {kind}")


def _gguf_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, where it begins and how many bytes it has."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    tensor, (rank,) = cursor.text().decode(), cursor.numbers("I")
    if not 1 <= rank <= 4:
        raise ValueError(f"its tensor {tensor} has {rank} dimensions")
    dimensions = cursor.numbers(f"{rank}Q")
    kind, offset = cursor.numbers("IQ")
    block, length = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    elements = math.prod(dimensions)
    if not elements or dimensions[0] % block:
        raise ValueError(f"its tensor {tensor} has the shape {dimensions}, which its type cannot have")
    return tensor, dimensions[::-1], offset, elements // block * length


class _Cursor:
    """Reads little-endian values one after the other. Raises ValueError where the file ends too soon."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self.size = len(content)
        self.at = 0

    def take(self, count: int) -> bytes:
        begin = self.at
        self.skip(count)
        return self._content[begin : self.at]

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise ValueError("it ends in the middle of its header")
        self.at += count

    def numbers(self, form: str) -> tuple[int, ...]:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def text(self) -> bytes:
        (length,) = self.numbers("Q")
        return self.take(length)


def _at_most(count: int, most: int, what: str) -> None:
    if count > most:
        raise ValueError(f"its header claims {count:,} {what}; at most {most:,} are read")


_KINDS: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (lambda head: not head, "empty"),
    (lambda head: head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 1, PICKLE),
    (lambda head: head[:4] == b"PK\x03\x04", f"a zip archive, as PyTorch keeps pickles in ({PICKLE})"),
    (lambda head: head[257:262] == b"ustar", f"a tar archive, as PyTorch kept pickles in ({PICKLE})"),
    (lambda head: head[:8] == b"\x89HDF\r\n\x1a\n", REFUSED[".h5"]),
    (lambda head: head[:6] == b"\x93NUMPY", REFUSED[".npy"]),
    (lambda head: head[:4] == GGUF_MAGIC, "a GGUF file, which is told by the ending .gguf"),
    (lambda head: head[:40].startswith(b"version https://git-lfs"), "a pointer of Git LFS; fetch what it points to"),
)


def _refused(file: Path, name: str, reason: str) -> UnsupportedModel:
    """Why `name` cannot be loaded: what it truly is where its content tells, else `reason`."""
    try:
        with file.open("rb") as stream:
            head = stream.read(512)
    except OSError:
        head = b"unreadable"
    telling = file.suffix != ".gguf" or head[:4] != GGUF_MAGIC
    kind = next((kind for is_one, kind in _KINDS if telling and is_one(head)), None)
    why = f"it is {kind}" if kind else (reason.strip() or "it is damaged").splitlines()[0][:300]
    return UnsupportedModel(f"{name} cannot be loaded: {why}", field="model", value=name, accepted=ACCEPTED)
