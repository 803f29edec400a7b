"""The latency profile of a model's layers on this device, with forward passes of the whole model to check it by."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from sqlalchemy import Engine
from torch import Tensor

from db.latency import get_profile, put_profile
from search.inventory import Layer
from search.latency import product
from search.latency_profile import CrossCheck, LatencyProfile, Product, Quantiles, Times
from search.scheme import FULL_PRECISION, Scheme
from workers.calibration import Batch, one_item
from workers.evaluator import describe_model
from workers.kernels.errors import KernelError
from workers.kernels.latency import SCHEMES, Bench, measured
from workers.kernels.linear import refusal, swapped
from workers.layers import CONVOLUTIONS
from workers.models import LoadedModel, load_model

log = logging.getLogger("bitfrontier.latency")


def profile_latency(
    engine: Engine,
    source: str,
    tokens: Sequence[int],
    schemes: Sequence[Scheme] = SCHEMES,
    device: str = "cpu",
    *,
    again: bool = False,
) -> LatencyProfile:
    """Time the products of a model's layers in passes of so many tokens (or images), and forward passes of the whole.

    What the stored profile has already is measured only `again`; what is measured is stored at once. Returns the
    profile as it is then stored. Raises UnsupportedModel or KernelError where model or device cannot be had.
    """
    bench = Bench.on(device)
    profiling = _Profiling.of(engine, bench, load_model(source, torch.device("cpu")), again=again)
    for count in tokens:
        profiling.time_products(count, schemes)
        profiling.check_forwards(count, schemes)
    return profiling.profile


@dataclass(slots=True)
class _Profiling:
    """A model on a bench. `untimed` are its layers that are no product, with the reason."""

    engine: Engine
    bench: Bench
    loaded: LoadedModel
    layers: list[Layer]
    untimed: dict[str, str]
    profile: LatencyProfile
    again: bool

    @classmethod
    def of(cls, engine: Engine, bench: Bench, loaded: LoadedModel, *, again: bool) -> _Profiling:
        layers = describe_model(loaded).layers
        reasons = {layer.name: _no_product(loaded, layer) for layer in layers}
        untimed = {name: reason for name, reason in reasons.items() if reason}
        for name, reason in untimed.items():
            log.warning("%s is not timed: %s", name, reason)
        loaded.model.to(bench.device, bench.dtype)
        fresh = bench.profile()
        stored = get_profile(engine, fresh.key)
        profile = fresh if stored is None else replace(stored, created=fresh.created)
        return cls(engine, bench, loaded, [one for one in layers if one.name not in untimed], untimed, profile, again)

    def time_products(self, tokens: int, schemes: Sequence[Scheme]) -> None:
        """Every scheme on every shape that occurs."""
        shapes = {shape for layer in self.layers if (shape := product(layer, tokens)) is not None}
        known = {} if self.again else self.profile.times
        for number, shape in enumerate(sorted(shapes), start=1):
            log.info("%s (%d of %d shapes)", shape, number, len(shapes))
            found: dict[Product, Times] = {}
            refused: dict[str, list[str]] = {}

            def done(
                timed: Product,
                times: Times | KernelError,
                found: dict[Product, Times] = found,
                refused: dict[str, list[str]] = refused,
            ) -> None:
                if isinstance(times, KernelError):
                    refused.setdefault(times.detail, []).append(str(timed[1]))
                else:
                    found[timed] = times

            wanted = [scheme for scheme in {*schemes, FULL_PRECISION} if (shape, scheme) not in known]
            measured(self.bench, [shape], wanted, done)
            for reason, names in refused.items():
                log.warning("left out for %s: %s (%s)", shape, reason, ", ".join(names))
            self._store(replace(self.profile, times=found, checks={}))

    def check_forwards(self, tokens: int, schemes: Sequence[Scheme]) -> None:
        """A forward pass for every scheme, in all layers that can take it, beside the sum of what the layers take."""
        if self.untimed:
            log.warning("the sum over layers is not checked: it lacks %s", ", ".join(self.untimed))
            return
        batch, digest = self._batch(tokens), self.loaded.digest
        for scheme in sorted({*schemes, FULL_PRECISION}):
            key = (digest, tokens, scheme)
            allocation = self._allocation(tokens, scheme)
            if (not self.again and key in self.profile.checks) or not (allocation or scheme == FULL_PRECISION):
                continue
            try:
                with swapped(self.loaded.model, allocation, backend=self.bench.backend):
                    forward, replayed = self._forward(batch)
            except (KernelError, torch.OutOfMemoryError) as error:
                log.warning("no forward pass of %d tokens in %s: %s", tokens, scheme, error)
                continue
            check = CrossCheck(round(self._sum(tokens, allocation), 3), forward, replayed)
            self._store(replace(self.profile, times={}, checks={key: check}))
            log.info(
                "%d tokens in %s: the layers take %.4g µs one by one, a forward pass %.4g µs (%+.0f %%)",
                tokens, scheme, check.layers_us, forward.p50, 100 * check.discrepancy,
            )  # fmt: skip

    def _store(self, newer: LatencyProfile) -> None:
        if newer.times or newer.checks:
            self.profile = put_profile(self.engine, newer)

    def _allocation(self, tokens: int, scheme: Scheme) -> dict[str, Scheme]:
        """The layers that can take a scheme, and whose time in it is known."""
        model = self.loaded.model
        return {
            layer.name: scheme
            for layer in self.layers
            if scheme != FULL_PRECISION
            and (product(layer, tokens), scheme) in self.profile.times
            and not any(refusal(model.get_submodule(name), scheme) for name in (layer.name, *layer.aliases))
        }

    def _sum(self, tokens: int, allocation: Mapping[str, Scheme]) -> float:
        """Of the medians of all layers, microseconds."""
        total = 0.0
        for layer in self.layers:
            shape = product(layer, tokens)
            if shape is not None:
                scheme = allocation.get(layer.name, FULL_PRECISION)
                total += layer.calls * self.profile.times[shape, scheme].replayed.p50
        return total

    @torch.no_grad()
    def _forward(self, batch: Batch) -> tuple[Quantiles, bool]:
        """What a pass takes, and whether it could be replayed: a model may ask, on the way, what it has computed."""

        def call() -> Tensor:
            return self.loaded(batch)

        try:
            return self.bench.watch.replayed([call]), True
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return self.bench.watch.cold([call]), False

    def _batch(self, tokens: int) -> Batch:
        """So many images; or so many tokens in as few sequences of one length as the model's positions allow."""
        item, config = one_item(self.loaded), self.loaded.model.config
        if not self.loaded.is_text:
            return {name: value.expand(tokens, -1, -1, -1).to(self.bench.dtype) for name, value in item.items()}
        positions = int(getattr(config, "max_position_embeddings", None) or tokens)
        # RoBERTa's first positions are no token's: 514 are 512.
        most = min(tokens, 1 << (positions.bit_length() - 1))
        length = next(length for length in range(most, 0, -1) if tokens % length == 0)
        return {name: value.expand(tokens // length, length).contiguous() for name, value in item.items()}


def _no_product(loaded: LoadedModel, layer: Layer) -> str | None:
    """Why a layer's time is not that of a product; None where it is."""
    if layer.kind == "experts":
        return "which of its experts run depends on the tokens"
    module = loaded.model.get_submodule(layer.name)
    if isinstance(module, CONVOLUTIONS) and module.groups != 1:
        return f"its {module.groups} groups of channels are a product each"
    return None
