"""What measured configurations say about the predictions: how far off they are, for which choices, and how surely.

Proxies are right about how layers compare and wrong about how precisions compare, by how much differs between kinds of
layers, and predictions add up where damage does not. So of predictions p (units × schemes)

    log loss = (1 + γ)·log Σ_u p_us·exp(θ_us) + noise        θ = Σ of effects, each normal around zero

where effects are shared: by all choices, by those of a scheme, by layers of one kind, by depth, down to a single
layer at a scheme. Many effects and few measurements: what is not supported stays near zero. The posterior is normal
around its mode (Laplace); the spread of the effects and the noise are those that predict some measurements best from
the others. Whatever γ, the best allocation under a budget is the knapsack's on p·exp(θ).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from search.space import Space, Unit

Floats = NDArray[np.float64]
Choices = NDArray[np.int64]
"""Configurations × units: scheme indices."""

SPREADS = {"all": 10.0, "scheme": 0.5, "kind": 0.4, "kind, scheme": 0.2, "depth": 0.3, "depth, scheme": 0.15}
SPREADS |= {"layer": 0.4, "layer, scheme": 0.3, "metric": 0.5}
"""Standard deviations of effects, before all but the first are scaled by one factor."""

POWER_SPREAD = 0.2
SCALES = (0.3, 0.6, 1.2)
NOISES = (0.02, 0.05, 0.1, 0.2)
"""Factors of the spreads, and standard deviations of the noise, among which the data choose."""

DEFAULT = (0.6, 0.1)
FEWEST = 4
FOLDS = 5
"""The choice where there are fewer measurements than this, and how many times some are left out to choose otherwise."""

SMALLEST = 1e-3
"""Of a scheme's median prediction: what counts for a unit that is predicted less, or less than nothing."""

MOST_CHOICES = 20_000
"""Where layers and schemes make more choices, there are no effects of single layers."""

AT_ONCE = 1_000_000
"""Units of so many configurations are looked at together: what is computed of each takes a hundred bytes."""

STEPS = 20
LONGEST_STEP = 2.0
SHORTEST_STEP = 1e-3


@dataclass(frozen=True, slots=True)
class Features:
    """Predictions in logarithms, and what their errors have in common.

    `logs` is units × schemes, −inf where nothing is lost. Effect e multiplies by exp(weights[e]·θ[groups[e]]), both
    effects × units × schemes; `spreads` are those of the θ.
    """

    logs: Floats
    groups: NDArray[np.int64]
    weights: Floats
    spreads: Floats

    @classmethod
    def of(cls, space: Space, tables: Mapping[str, Floats]) -> Features:
        """Of a space and metrics' predictions (units × schemes); their geometric mean is what is corrected.

        Raises ValueError without a table.
        """
        if not tables:
            raise ValueError("a surrogate corrects at least one table")
        logs = [_logs(table) for table in tables.values()]
        mean = np.mean(logs, axis=0)
        shape, lost = mean.shape, np.isfinite(mean)
        rows, columns = np.indices(shape)
        kinds = _numbered([_kind(unit) for unit in space.units])[:, None] + 0 * columns
        depth = np.linspace(-1, 1, shape[0])[:, None] + 0.0 * columns
        ones, schemes = np.ones(shape), shape[1]

        groups, weights, spreads, count = [], [], [], 0

        def effect(name: str, group: NDArray[np.int64], weight: Floats) -> None:
            nonlocal count
            groups.append(group + count)
            weights.append(np.where(lost, weight, 0.0))
            spreads.append(np.full(int(group.max()) + 1, SPREADS[name]))
            count += len(spreads[-1])

        effect("all", 0 * rows, ones)
        effect("scheme", columns, ones)
        effect("kind", kinds, ones)
        effect("kind, scheme", kinds * schemes + columns, ones)
        for power in (1, 2):
            effect("depth", 0 * rows, depth**power)
            effect("depth, scheme", columns, depth**power)
        # Groups of channels are too many to tell apart: what a layer's have in common, measurements may tell.
        layers = space.layer_of[:, None] + 0 * columns
        if (layers.max() + 1) * schemes <= MOST_CHOICES:
            effect("layer", layers, ones)
            effect("layer, scheme", layers * schemes + columns, ones)
        for one in logs if len(logs) > 1 else []:
            apart = np.where(lost, one - np.where(lost, mean, 0.0), 0.0)
            effect("metric", 0 * rows, apart - apart[lost].mean())
        return cls(mean, np.array(groups), np.array(weights), np.concatenate(spreads))

    @property
    def predicted(self) -> Floats:
        """What is corrected, units × schemes; 0 where nothing is lost or a choice is closed."""
        predicted: Floats = np.exp(self.logs)
        return predicted

    def corrected(self, effects: Floats) -> Floats:
        """log p + θ of every choice."""
        logs: Floats = self.logs + (self.weights * effects[self.groups]).sum(axis=0)
        return logs


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The posterior given some measured configurations.

    `mode` holds the effects and, last, γ; `jacobian` (measurements × parameters) and `factor` (the Cholesky factor of
    the measurements' covariance) are those at the mode.
    """

    features: Features
    spreads: Floats
    noise: float
    mode: Floats
    jacobian: Floats
    factor: Floats

    @classmethod
    def fit(cls, features: Features, choices: Choices, losses: Floats) -> Surrogate:
        """Of measured losses; those that are not above zero, or predicted to be zero, tell nothing.

        The spreads and the noise are those that predict each fifth of the measurements best from the others.
        """
        # Where nothing is predicted to be lost no effect can say that something is.
        told = (losses > 0) & np.isfinite(features.logs[np.arange(choices.shape[1]), choices]).any(axis=1)
        choices, observed = choices[told], np.log(losses[told])
        folds = np.arange(len(observed)) % FOLDS

        def score(scale: float, noise: float) -> float:
            """Mean log density of what is left out. A closed form would not do: the mode owes something to each
            measurement, and flexible fits would seem to predict what they have seen."""
            densities = []
            for fold in range(min(FOLDS, len(observed))):
                left, out = folds != fold, folds == fold
                fitted = cls._fit(features, choices[left], observed[left], scale, noise)
                means, deviations = fitted.predict(choices[out])
                z = (observed[out] - means) / deviations
                densities.append(-0.5 * z**2 - np.log(deviations))
            return float(np.concatenate(densities).mean())

        settings = list(product(SCALES, NOISES))
        best = max(settings, key=lambda one: score(*one)) if len(observed) >= FEWEST else DEFAULT
        return cls._fit(features, choices, observed, *best)

    @classmethod
    def _fit(cls, features: Features, choices: Choices, observed: Floats, scale: float, noise: float) -> Surrogate:
        """Gauss–Newton steps to the mode."""
        shared = features.spreads == SPREADS["all"]
        spreads = np.append(np.where(shared, 1.0, scale) * features.spreads, POWER_SPREAD * scale)
        self = cls(features, spreads, noise, np.zeros(len(spreads)), np.zeros((0, 0)), np.zeros((0, 0)))
        for _ in range(STEPS):
            predicted, jacobian = self._linearized(choices)
            covariance = (jacobian * spreads**2) @ jacobian.T + noise**2 * np.eye(len(observed))
            errors = observed - predicted + jacobian @ self.mode
            step = spreads**2 * (jacobian.T @ np.linalg.solve(covariance, errors)) - self.mode
            longest = float(np.abs(step).max(initial=0.0))
            self = replace(self, mode=self.mode + step * min(1.0, LONGEST_STEP / max(longest, 1e-300)))
            if longest < SHORTEST_STEP:
                break
        _, jacobian = self._linearized(choices)
        covariance = (jacobian * spreads**2) @ jacobian.T + noise**2 * np.eye(len(observed))
        return replace(self, jacobian=jacobian, factor=np.linalg.cholesky(covariance))

    @property
    def table(self) -> Floats:
        """The corrected predictions, units × schemes: what an allocation is chosen by."""
        return np.exp(self.features.corrected(self.mode[:-1]))

    @property
    def power(self) -> float:
        """1 + γ: the loss is the sum of an allocation's corrected predictions to this power."""
        return float(1 + self.mode[-1])

    def predict(self, choices: Choices) -> tuple[Floats, Floats]:
        """Mean and standard deviation of log loss, of what a measurement would give."""
        mean, jacobian = self._linearized(choices)
        prior = jacobian * self.spreads**2
        known = np.linalg.solve(self.factor, self.jacobian @ prior.T)
        variance = (prior * jacobian).sum(axis=1) - (known**2).sum(axis=0)
        return mean, np.sqrt(variance.clip(min=0) + self.noise**2)

    def draw(self, generator: np.random.Generator) -> Floats:
        """A table of the posterior."""
        return np.exp(self.features.corrected(self._parameters(generator)[:-1]))

    def _parameters(self, generator: np.random.Generator) -> Floats:
        """Drawn from the posterior by Matheron's rule: a draw of the prior, corrected by what it gets wrong."""
        drawn = generator.normal(size=len(self.spreads)) * self.spreads
        wrong = self.jacobian @ drawn + generator.normal(size=len(self.jacobian)) * self.noise
        settled = np.linalg.solve(self.factor.T, np.linalg.solve(self.factor, wrong))
        parameters: Floats = self.mode + drawn - self.spreads**2 * (self.jacobian.T @ settled)
        return parameters

    def _linearized(self, choices: Choices) -> tuple[Floats, Floats]:
        """log loss of configurations, and its derivatives with respect to the parameters."""
        corrected, parts = self.features.corrected(self.mode[:-1]), -(-choices.size // AT_ONCE)
        found = [self._linearized_in(corrected, part) for part in np.array_split(choices, max(1, parts))]
        means, derivatives = zip(*found, strict=True)
        return np.concatenate(means), np.concatenate(derivatives)

    def _linearized_in(self, corrected: Floats, choices: Choices) -> tuple[Floats, Floats]:
        count, units = choices.shape
        at = np.arange(units), choices
        logs = corrected[at]
        largest = logs.max(axis=1, keepdims=True).clip(min=-700)
        shares = np.exp(logs - largest)
        totals = shares.sum(axis=1, keepdims=True).clip(min=1e-300)
        log_totals = (largest + np.log(totals))[:, 0]
        shares /= totals
        power, width = self.power, len(self.mode)
        first = np.arange(count)[:, None] * width
        jacobian = np.zeros(count * width)
        for group, weight in zip(self.features.groups, self.features.weights, strict=True):
            jacobian += np.bincount((first + group[at]).ravel(), (power * shares * weight[at]).ravel(), count * width)
        derivatives = jacobian.reshape(count, width)
        derivatives[:, -1] = log_totals
        return power * log_totals, derivatives


def _logs(table: Floats) -> Floats:
    """With a floor for what is predicted too small; −inf where exactly nothing is lost or a choice is closed."""
    open_ = np.isfinite(table) & (table != 0)
    positive = np.where(open_ & (table > 0), table, np.nan)
    floors = [SMALLEST * np.nanmedian(column) if np.isfinite(column).any() else 1e-300 for column in positive.T]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(open_, np.log(np.maximum(table, floors)), -np.inf)


def _kind(unit: Unit) -> str:
    """What units at the same place of different blocks have in common."""
    return f"{unit.layers[0].kind} {re.sub(r'[0-9]+', '#', unit.name)}"


def _numbered(names: list[str]) -> NDArray[np.int64]:
    return np.unique(names, return_inverse=True)[1].astype(np.int64)
