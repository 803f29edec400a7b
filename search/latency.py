"""What a choice costs in time: the sum of what its layers' products take on a device, by a stored profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search.cost import Cost
from search.errors import InvalidRequest
from search.inventory import Layer
from search.latency_profile import LatencyProfile, Shape
from search.request import CostRequest
from search.scheme import FULL_PRECISION, Scheme
from search.space import Space

NAMED = 5
"""So many products a message names at most."""


@dataclass(frozen=True, slots=True)
class Latency:
    """By what a search of `model` counts time: a device's profile, and the `tokens` (or images) of a forward pass."""

    profile: LatencyProfile
    tokens: int
    model: str

    def cost(self, space: Space) -> Cost:
        """`latency_us`: the medians of the products of all layers, one after the other, those that are not searched in
        16 bits; neither what lookups of embeddings take, nor anything between the layers.

        Raises InvalidRequest naming the products that the profile has no time of, and the command that measures them.
        """
        wanted = {(layer, FULL_PRECISION) for layer in space.ignored} | {
            (layer, scheme)
            for unit, allowed in zip(space.units, space.allowed, strict=True)
            for scheme, open_ in zip(space.schemes, allowed, strict=True)
            if open_
            for layer in unit.layers
        }
        times = {(layer, scheme): self.median(layer, scheme) for layer, scheme in wanted}
        missing = [pair for pair, time in times.items() if time is None]
        if missing:
            raise self._unknown(missing)
        table = [
            [
                sum(times[layer, scheme] or 0.0 for layer in unit.layers) if open_ else np.inf
                for scheme, open_ in zip(space.schemes, allowed, strict=True)
            ]
            for unit, allowed in zip(space.units, space.allowed, strict=True)
        ]
        unsearched = sum(times[layer, FULL_PRECISION] or 0.0 for layer in space.ignored)
        return Cost("latency_us", np.array(table), float(unsearched))

    def median(self, layer: Layer, scheme: Scheme) -> float | None:
        """Microseconds of all products of a layer in one pass; None where the profile has none of its shape."""
        shape = product(layer, self.tokens)
        if shape is None:
            return 0.0
        times = self.profile.times.get((shape, scheme))
        return None if times is None else layer.calls * times.replayed.p50

    def summary(self, digest: str) -> dict[str, Any]:
        """What a result says of it; by `crosscheck`, how far the sums are from forward passes of the model."""
        weights = digest.partition(":")[0]
        return {
            "profile": self.profile.device,
            "key": self.profile.key,
            "driver": self.profile.driver,
            "backend": self.profile.backend,
            "tokens": self.tokens,
            "crosscheck": [
                {"scheme": str(scheme), "layers_us": check.layers_us, "forward_us": check.forward.p50}
                | {"discrepancy": check.discrepancy, "replayed": check.replayed}
                for (model, tokens, scheme), check in sorted(self.profile.checks.items())
                if (model, tokens) == (weights, self.tokens)
            ],
        }

    def _unknown(self, missing: Sequence[tuple[Layer, Scheme]]) -> InvalidRequest:
        products = sorted({(product(layer, self.tokens) or Shape(0, 0, 0), scheme) for layer, scheme in missing})
        named = ", ".join(f"{scheme} of {shape}" for shape, scheme in products[:NAMED])
        more = f" and {len(products) - NAMED} more" if len(products) > NAMED else ""
        schemes = ",".join(str(scheme) for scheme in sorted({scheme for _, scheme in products}))
        layer = min(missing, key=lambda pair: pair[0].name)[0]
        return InvalidRequest(
            f"the latency profile of {self.profile.device} has no time of {named}{more}; {layer.name} needs one",
            field="latency",
            value={"profile": self.profile.device, "tokens": self.tokens},
            accepted=f"`bitfrontier latency profile {self.model} --tokens {self.tokens} --schemes {schemes}` on that "
            "device measures them; layers that its kernels cannot multiply so belong in space.ignore or space.pin, "
            "schemes for which it has none out of space.schemes",
        )


def product(layer: Layer, tokens: int) -> Shape | None:
    """The product that a layer computes, `layer.calls` times, in a pass of so many tokens or images; None where it
    multiplies nothing (an embedding).

    An image has many places, each of which is a token to a linear layer, and to a convolution as a matrix product.
    Raises InvalidRequest for experts: which of their weights run depends on the tokens.
    """
    if layer.kind == "experts":
        raise InvalidRequest(
            f"{layer.name} runs other experts for every token, and no product has its time",
            field="latency",
            value=layer.name,
            accepted="models without experts, or budgets without latency",
        )
    if not layer.macs:
        return None
    places = layer.macs // (layer.weights * layer.calls)
    return Shape(layer.rows, layer.columns, places * tokens)


def chosen(request: CostRequest, profiles: Sequence[LatencyProfile]) -> Latency | None:
    """The profile that a request names, by its device or its key; of several, the first. None where it counts no time.

    Raises InvalidRequest naming the profiles there are, for another name or where a budget on latency names none.
    """
    asked = request.latency
    if not request.counts_latency:
        return None
    name = asked.profile if asked else None
    for profile in profiles:
        if asked is not None and name in (profile.device, profile.key):
            return Latency(profile, asked.tokens, request.model)
    there = list(dict.fromkeys(profile.device for profile in profiles))
    told = f"there are: {', '.join(there)}" if there else "there is none yet"
    raise InvalidRequest(
        f"there is no latency profile '{name}'; {told}" if name else f"a budget on latency needs a profile; {told}",
        field="latency.profile" if name else "latency",
        value=name,
        accepted=there or "a profile that `bitfrontier latency profile` measures or `bitfrontier latency import` reads",
    )
