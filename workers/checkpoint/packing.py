"""compressed-tensors' dense packing (since 0.18): codes of b bits one after another in 32-bit words, no bit unused."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WORD_BITS = 32
FIELD_BITS = 8
"""Codes come in bytes; eight of them are packed at once, in one 64-bit integer."""


def words_of(count: int, bits: int) -> int:
    """How many 32-bit words hold `count` codes."""
    return -(-count * bits // WORD_BITS)


def pack(codes: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """rows × columns codes from −2^(b−1) to 2^(b−1)−1 as rows × words.

    A code is stored plus 2^(b−1); the first one of a row has the least significant bits of its first word.
    """
    rows, columns = codes.shape
    fields = np.zeros((rows, -(-columns // FIELD_BITS) * FIELD_BITS), np.uint8)
    fields[:, :columns] = codes.view(np.uint8) + np.uint8(1 << (bits - 1))
    eights = fields.view("<u8")
    for width, low in _merges(bits):
        eights = (eights & low) | ((eights & (low << np.uint64(width))) >> np.uint64(width - _used(width, bits)))
    octets = eights.view(np.uint8).reshape(rows, -1, FIELD_BITS)[:, :, :bits].reshape(rows, -1)
    stored = np.zeros((rows, words_of(columns, bits) * 4), np.uint8)
    kept = min(octets.shape[1], stored.shape[1])
    stored[:, :kept] = octets[:, :kept]
    return stored.view("<i4")


def unpack(words: NDArray[np.int32], bits: int, columns: int) -> NDArray[np.int8]:
    """The inverse of `pack`."""
    rows = len(words)
    octets = np.zeros((rows, -(-columns // FIELD_BITS) * bits), np.uint8)
    stored = np.ascontiguousarray(words).view(np.uint8)
    kept = min(octets.shape[1], stored.shape[1])
    octets[:, :kept] = stored[:, :kept]
    fields = np.zeros((rows, octets.shape[1] // bits, FIELD_BITS), np.uint8)
    fields[:, :, :bits] = octets.reshape(rows, -1, bits)
    eights = fields.reshape(rows, -1).view("<u8")
    for width, low in reversed(_merges(bits)):
        moved = np.uint64(width - _used(width, bits))
        eights = (eights & low) | ((eights << moved) & (low << np.uint64(width)))
    return (eights.view(np.uint8)[:, :columns] - np.uint8(1 << (bits - 1))).view(np.int8)


def _merges(bits: int) -> list[tuple[int, np.uint64]]:
    """The steps that merge neighbours in a 64-bit integer: the width of the fields before, and a mask of every other
    one, as far as it is used."""
    widths = (FIELD_BITS, 2 * FIELD_BITS, 4 * FIELD_BITS)
    return [
        (width, np.uint64(sum(((1 << _used(width, bits)) - 1) << start for start in range(0, 64, 2 * width))))
        for width in widths
    ]


def _used(width: int, bits: int) -> int:
    return width // FIELD_BITS * bits
