"""Which results a search computed, and which it found: the same numbers, however many attempts it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from db.results import Stored

NAMED = 5
"""So many searches whose results were reused are named."""


@dataclass(slots=True)
class Counts:
    """Of the distinct results that a search has asked for: what any of its attempts stored, it has computed."""

    search_id: int
    computed: int = 0
    reused: Counter[int | None] = field(default_factory=Counter)
    """By the search that computed them; None where it is gone."""
    _seen: set[str] = field(default_factory=set)
    _lately: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, found: Mapping[str, Stored]) -> None:
        """Count results by their keys, each once."""
        for key in found.keys() - self._seen:
            if found[key].search_id == self.search_id:
                self.computed += 1
            else:
                self.reused[found[key].search_id] += 1
                self._lately[kind] += 1
        self._seen |= found.keys()

    def reused_lately(self) -> dict[str, int]:
        """How many were reused since this was last asked, by kind."""
        lately, self._lately = dict(self._lately), Counter()
        return lately

    def summary(self) -> dict[str, Any]:
        """`computed`, `reused`, and `reused_from`: the ids of the searches that gave most."""
        given = sorted((-count, search_id) for search_id, count in self.reused.items() if search_id is not None)
        sources = [search_id for _, search_id in given[:NAMED]]
        return {"computed": self.computed, "reused": self.reused.total(), "reused_from": sources}
