"""The scheme grammar: how a layer is stored and multiplied. Needs only the standard library."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from search.errors import InvalidRequest

WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
ACTIVATION_BITS = (4, 6, 8, 16)
GROUP_SIZES = (16, 32, 64, 128, 256)
SCALE_BITS = 16

GRAMMAR = (
    "w<bits>a<bits>[g<size>][asym] with weight bits in {2…8, 16}, activation bits in {4, 6, 8, 16}, "
    "group size in {16, 32, 64, 128, 256} (none: one scale per output channel), for example w4a16g64 or w8a8"
)

_PATTERN = re.compile(r"w([0-9]{1,2})a([0-9]{1,2})(?:g([0-9]{1,3}))?(asym)?")


@dataclass(frozen=True, slots=True)
class Scheme:
    """Weight bits, activation bits, group size along the input (None: per output channel) and symmetry.

    16 bits mean "as stored": neither scaled nor rounded.
    """

    weight_bits: int
    activation_bits: int = 16
    group_size: int | None = None
    symmetric: bool = True

    @classmethod
    def parse(cls, text: str, field: str = "space.schemes") -> Scheme:
        """Read `w4a16g64asym`.

        Raises InvalidRequest naming `field` when `text` is not in the grammar.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise _refused(text, field)
        weight_bits, activation_bits, group, asym = match.groups()
        scheme = cls(int(weight_bits), int(activation_bits), int(group) if group else None, asym is None)
        weights_kept = scheme.weight_bits == 16
        if (
            scheme.weight_bits not in WEIGHT_BITS
            or scheme.activation_bits not in ACTIVATION_BITS
            or (scheme.group_size is not None and scheme.group_size not in GROUP_SIZES)
            or (weights_kept and scheme != cls(16))
        ):
            raise _refused(text, field)
        return scheme

    def __str__(self) -> str:
        group = f"g{self.group_size}" if self.group_size else ""
        return f"w{self.weight_bits}a{self.activation_bits}{group}{'' if self.symmetric else 'asym'}"

    def __lt__(self, other: Scheme) -> bool:
        return self._fineness() < other._fineness()

    def _fineness(self) -> tuple[int, int, float, bool]:
        return self.weight_bits, self.activation_bits, 1 / (self.group_size or math.inf), not self.symmetric

    @property
    def quantizes_weights(self) -> bool:
        """Whether weights are rounded at all."""
        return self.weight_bits < 16

    @property
    def quantizes_activations(self) -> bool:
        """Whether the layer's input is rounded at all."""
        return self.activation_bits < 16

    def fits(self, columns: int) -> bool:
        """Whether the group size divides a weight row of `columns` inputs."""
        return self.group_size is None or columns % self.group_size == 0

    def storage_bits(self, rows: int, columns: int) -> int:
        """Bits to store a rows × columns weight: densely packed codes, 16-bit scales, zero points as wide as a code."""
        codes = rows * columns * self.weight_bits
        if not self.quantizes_weights:
            return codes
        groups = rows * (columns // self.group_size if self.group_size else 1)
        return codes + groups * (SCALE_BITS + (0 if self.symmetric else self.weight_bits))


FULL_PRECISION = Scheme(16)


def _refused(text: str, field: str) -> InvalidRequest:
    return InvalidRequest(f"'{text}' is not a scheme", field=field, value=text, accepted=GRAMMAR)
