"""Choices made of choices, within all budgets: switches of levels, and blocks of two parents.

A level is the place of a scheme among those open to its unit, from the cheapest up. One unit goes up and another comes
down, as in EvoPress (Sieberling et al., 2410.14649): an evaluation is too dear to learn from it that a budget is hard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from search.budget import Bound
from search.cost import Cost, Resource
from search.space import Space

Choice = NDArray[np.int64]
"""A scheme index for every unit."""

CROSSED = 0.3
PAIRED = 0.25
"""Shares of children with two parents, and of switches that fit by themselves but take a partner all the same."""


class Variation:
    """Makes choices of choices that are open and within all bounds; what it makes is so, too. `axis` orders levels."""

    def __init__(self, space: Space, costs: Mapping[Resource, Cost], bounds: Sequence[Bound], axis: Resource) -> None:
        self._open = space.allowed
        self._bounded = [(bound, costs[bound.resource]) for bound in bounds]
        self._costs = np.array([cost.table for _, cost in self._bounded]).reshape(-1, *space.allowed.shape)
        self._capacities = np.array([bound.capacity(cost) for bound, cost in self._bounded])
        order = np.where(space.allowed, costs[axis].table, np.inf).argsort(axis=1, kind="stable")
        self._levels = order.argsort(axis=1)
        self._blocks = np.unique([unit.block or unit.name for unit in space.units], return_inverse=True)[1]

    def admits(self, choice: Choice) -> bool:
        """Whether a choice is open and keeps all bounds."""
        open_ = bool(self._open[np.arange(len(choice)), choice].all())
        return open_ and all(bound.admits(cost.total(choice)) for bound, cost in self._bounded)

    def child(self, one: Choice, other: Choice, generator: np.random.Generator) -> Choice:
        """Of two parents or of one, with some switches; may be equal to a parent."""
        crossed = generator.random() < CROSSED
        child = self.crossed(one, other, generator) if crossed else one
        for _ in range(generator.geometric(0.5) - crossed):
            child = self.switched(child, generator)
        return child

    def crossed(self, one: Choice, other: Choice, generator: np.random.Generator) -> Choice:
        """Each block as in one or in the other; where that exceeds a bound, block after block as in `one` again."""
        from_other = generator.random(int(self._blocks.max()) + 1) < 0.5
        child = np.where(from_other[self._blocks], other, one)
        for block in generator.permutation(np.flatnonzero(from_other)):
            if self.admits(child):
                break
            child = np.where(self._blocks == block, one, child)
        return child

    def switched(self, choice: Choice, generator: np.random.Generator) -> Choice:
        """One unit a level up or down, or one up and another down; as it was where what is drawn exceeds a bound."""
        units, schemes, extra, room = self._switches(choice)
        steps = self._levels[units, schemes] - self._levels[units, choice[units]]
        near = np.flatnonzero(np.abs(steps) == 1)
        if not len(near):
            return choice
        first = generator.choice(near)
        left = room - extra[:, first]
        alone = bool((left >= 0).all())
        fits = (extra <= left[:, None]).all(axis=0) & (steps == -steps[first]) & (units != units[first])
        partners = np.flatnonzero(fits)
        if len(partners) and (not alone or generator.random() < PAIRED):
            both = np.array([first, generator.choice(partners)])
            return _with(choice, units[both], schemes[both])
        return _with(choice, units[[first]], schemes[[first]]) if alone else choice

    def one_switch(self, choice: Choice) -> Iterator[Choice]:
        """All choices within the bounds that differ in one unit."""
        units, schemes, extra, room = self._switches(choice)
        for at in np.flatnonzero((extra <= room[:, None]).all(axis=0)):
            yield _with(choice, units[[at]], schemes[[at]])

    def two_switches(self, choice: Choice) -> Iterator[Choice]:
        """All choices within the bounds that differ in two units."""
        units, schemes, extra, room = self._switches(choice)
        for first in range(len(units)):
            fits = (extra <= (room - extra[:, first])[:, None]).all(axis=0) & (units > units[first])
            for second in np.flatnonzero(fits):
                both = np.array([first, second])
                yield _with(choice, units[both], schemes[both])

    def _switches(self, choice: Choice) -> tuple[Choice, Choice, NDArray[np.float64], NDArray[np.float64]]:
        """Units, other schemes open to them, what each switch adds (bounds × switches), and what the bounds leave."""
        units, schemes = np.nonzero(self._open & (np.arange(self._open.shape[1]) != choice[:, None]))
        now = self._costs[:, np.arange(len(choice)), choice]
        return units, schemes, self._costs[:, units, schemes] - now[:, units], self._capacities - now.sum(axis=1)


def _with(choice: Choice, units: Choice, schemes: Choice) -> Choice:
    switched = choice.copy()
    switched[units] = schemes
    return switched
