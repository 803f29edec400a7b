"""Evolution: new configurations bred from measured ones, for less measured loss at less cost.

NSGA-II (Deb et al., IEEE Trans. Evol. Comput. 6(2), 2002): of all before, the undominated and the least crowded are the
parents of a generation, which Optuna selects and stores. Their children are `search.variation`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from math import isfinite

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution
from optuna.samplers import NSGAIISampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.budget import Bound
from search.cost import Cost, Resource
from search.space import Space
from search.variation import Choice, Variation

POPULATION = 16

TRIES = 64
"""Children drawn before the neighbours of all that was asked are gone through for one that was not."""

# What Optuna has to say goes where all logs go.
optuna.logging.disable_default_handler()
optuna.logging.enable_propagation()
optuna.logging.set_verbosity(optuna.logging.WARNING)


class Evolution:
    """A search by ask and tell: ask for a batch, measure it in any order, tell each loss.

    Two objectives are minimised, the measured loss and the total cost in `axis`; `costs` are by resource, `bounds`
    hard. `seeds` are asked first, those that exceed a bound left out; where none is left, nothing is asked. Schemes
    that are closed, and those of pinned units, never change.

    The Optuna study `name` in `storage` (in memory, unless given) holds all that was asked and told. Made again of the
    same arguments, an evolution goes on where it was cut off: what was asked and not told is asked again, before
    anything new. The same seed and the same tells give the same choices, cut off or not.
    """

    def __init__(
        self,
        space: Space,
        costs: Mapping[Resource, Cost],
        bounds: Sequence[Bound],
        axis: Resource,
        *,
        seeds: Sequence[Choice],
        seed: int,
        storage: BaseStorage | None = None,
        name: str = "evolution",
        population: int = POPULATION,
    ) -> None:
        self._space, self._cost, self._seed = space, costs[axis], seed
        self._variation = Variation(space, costs, bounds, axis)
        self._seeds = [choice for choice in seeds if self._variation.admits(choice)]
        self._distributions = {
            unit.name: CategoricalDistribution([str(space.schemes[column]) for column in np.flatnonzero(row)])
            for unit, row in zip(space.units, space.allowed, strict=True)
            if row.sum() > 1
        }
        self._sampler = NSGAIISampler(population_size=population, seed=seed)
        self._study = optuna.create_study(
            study_name=name,
            storage=storage,
            directions=["minimize", "minimize"],
            sampler=self._sampler,
            load_if_exists=True,
        )
        self._asked: dict[bytes, int] = {}
        self._untold: list[Choice] = []
        for trial in self._study.get_trials(deepcopy=False):
            choice = self._enter(trial)
            if trial.state == TrialState.RUNNING:
                self._untold.append(choice)

    def ask(self, count: int) -> list[Choice]:
        """At most `count` choices to measure, none of which was asked before; fewer where no other is found."""
        choices, self._untold = self._untold[:count], self._untold[count:]
        while len(choices) < count and (choice := self._next()) is not None:
            # Optuna's own ask would write one parameter after the other: slow, and a crash could come in between.
            trial = create_trial(
                state=TrialState.RUNNING, params=self._parameters(choice), distributions=self._distributions
            )
            self._study.add_trial(trial)
            choices.append(self._enter(self._study.get_trials(deepcopy=False)[-1]))
        return choices

    @property
    def told(self) -> list[Choice]:
        """What was asked and told, in the order in which it was asked."""
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
        return [self._choice(trial.params) for trial in trials]

    def tell(self, choice: Choice, loss: float) -> None:
        """The measured loss of a choice that was asked; one that is not finite says that measuring failed.

        Told again, it stays as it was. Raises ValueError for a choice that was never asked.
        """
        number = self._asked.get(_key(choice))
        if number is None:
            raise ValueError(f"the choice {choice.tolist()} was never asked")
        values = [float(loss), self._cost.total(choice)] if isfinite(loss) else None
        state = TrialState.COMPLETE if values else TrialState.FAIL
        self._study.tell(number, values, state=state, skip_if_finished=True)

    def copy_to(self, storage: BaseStorage, name: str) -> None:
        """Add what was told, and is not there yet, to the study `name` of another storage."""
        directions = self._study.directions
        copy = optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
        told = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
        copy.add_trials(told[len(copy.get_trials(deepcopy=False)) :])

    def _enter(self, trial: FrozenTrial) -> Choice:
        """The choice of a trial, which is now known to be asked, and in a generation."""
        self._sampler.get_trial_generation(self._study, trial)
        choice = self._choice(trial.params)
        self._asked[_key(choice)] = trial.number
        return choice

    def _next(self) -> Choice | None:
        """A seed while there is one, then children, then what is near to anything that was asked."""
        generator = np.random.default_rng([self._seed, len(self._asked)])
        children = self._children(generator) if self._seeds else iter(())
        return next(filter(self._is_new, chain(self._seeds, children, self._neighbours())), None)

    def _children(self, generator: np.random.Generator) -> Iterator[Choice]:
        """Of the parents of the first generation that is not full; those of the first of all are the seeds."""
        generation = 0
        while len(self._sampler.get_population(self._study, generation)) >= self._sampler.population_size:
            generation += 1
        parents = self._sampler.get_parent_population(self._study, generation)
        # When it is selected a population has another order than when it is read again.
        parents = sorted(parents, key=lambda trial: trial.number)
        choices = [self._choice(trial.params) for trial in parents] or self._seeds
        values = np.array([trial.values for trial in parents] or [[0.0]] * len(choices))
        for _ in range(TRIES):
            one, other = (choices[_winner(values, generator)] for _ in range(2))
            yield self._variation.child(one, other, generator)

    def _neighbours(self) -> Iterator[Choice]:
        """One switch away from what was asked, then two."""
        asked = [np.frombuffer(key, dtype=np.int64) for key in self._asked]
        for neighbours in (self._variation.one_switch, self._variation.two_switches):
            for choice in asked:
                yield from neighbours(choice)

    def _is_new(self, choice: Choice) -> bool:
        # Sums in another order round otherwise: the bounds have the last word.
        return _key(choice) not in self._asked and self._variation.admits(choice)

    def _parameters(self, choice: Choice) -> dict[str, str]:
        """Unit → scheme, of the units that have several."""
        names = (unit.name for unit in self._space.units)
        return {
            name: str(self._space.schemes[column])
            for name, column in zip(names, choice, strict=True)
            if name in self._distributions
        }

    def _choice(self, parameters: Mapping[str, str]) -> Choice:
        """The inverse of `_parameters`."""
        columns = {str(scheme): column for column, scheme in enumerate(self._space.schemes)}
        settled = self._space.allowed.argmax(axis=1)
        taken = (parameters.get(unit.name) for unit in self._space.units)
        return np.array(
            [columns[text] if text else column for text, column in zip(taken, settled, strict=True)], dtype=np.int64
        )


def _key(choice: Choice) -> bytes:
    return np.asarray(choice, dtype=np.int64).tobytes()


def _winner(values: NDArray[np.float64], generator: np.random.Generator) -> int:
    """The better of two drawn at random, the first where none dominates: NSGA-II's tournament."""
    one, other = generator.integers(len(values), size=2)
    dominated = (values[other] <= values[one]).all() and (values[other] < values[one]).any()
    return int(other if dominated else one)
