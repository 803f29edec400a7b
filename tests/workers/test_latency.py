"""From the times of a device to a search under a latency budget: measured here, or read from a file."""

import logging
import sys
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine

from db import queue
from db.candidates import candidates
from db.latency import list_profiles, put_profile
from db.searches import Search, create_search, get_search
from search.errors import InfeasibleBudget, InvalidRequest
from search.inventory import Inventory
from search.latency import product
from search.latency_profile import LatencyProfile, Shape, read_profile, write_profile
from search.request import SearchRequest
from search.scheme import FULL_PRECISION, Scheme
from tests.search.profiles import DEVICE, profile_of
from tests.workers.conftest import Loader, ModelFolder
from workers import __main__ as process
from workers.evaluator import describe_model
from workers.kernels import stopwatch
from workers.kernels.stopwatch import CpuStopwatch
from workers.latency import profile_latency
from workers.pipeline import run_search
from workers.pools import InProcessPool

pytestmark = pytest.mark.long

SCHEMES = ["w3a16", "w4a8", "w8a8"]
ASKED = [Scheme.parse(text) for text in SCHEMES]


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REPLAYS", "LAUNCHES"):
        monkeypatch.setattr(stopwatch, name, 9)
    monkeypatch.setattr(stopwatch, "CPU_CACHE", 2**20)
    monkeypatch.setattr(CpuStopwatch, "cache_bytes", 2**20)


def search(engine: Engine, **changes: Any) -> Search:
    """Ask for it, and do it."""
    document = {
        "model": "digits-vit",
        "calibration": {"dataset": "digits", "samples": 64},
        "space": {"schemes": SCHEMES, "ignore": ["*patch_embeddings*"]},
        "latency": {"profile": DEVICE, "tokens": 4},
        "optimizer": {"points": 8, "evaluations": 10},
    }
    asked, _ = create_search(engine, SearchRequest.model_validate(document | changes))
    claimed = queue.claim(engine, "test", timedelta(minutes=1))
    assert claimed is not None
    run_search(engine, claimed, InProcessPool, lambda: None)
    return get_search(engine, asked.id)


@pytest.fixture
def inventory(loaded: Loader) -> Inventory:
    return describe_model(loaded("digits_vit"))


@pytest.fixture
def elsewhere(digits: Engine, inventory: Inventory) -> LatencyProfile:
    """The profile of a GPU that this machine has not, from its file."""
    text = write_profile(profile_of(inventory, SCHEMES, (4,)))
    return put_profile(digits, read_profile(text))


@pytest.mark.usefixtures("elsewhere")
def test_a_machine_without_the_gpu_searches_for_it_within_a_latency_budget(
    digits: Engine, elsewhere: LatencyProfile, inventory: Inventory
) -> None:
    done = search(digits, budgets={"latency_ms": 0.17})
    assert done.summary is not None
    found = candidates(digits, done.id)
    feasible = done.summary["feasible"]["latency_us"]
    assert feasible["min"] < 170 < feasible["max"]
    assert done.summary["axes"] == ["latency_us"]
    frontier = [point for point in found if point.on_frontier]
    assert frontier
    assert all(point.costs["latency_us"] <= 170 for point in frontier)
    assert any(point.costs["latency_us"] > 170 for point in found), "some uniform configuration is over budget"
    for point in found:
        expected = sum(
            elsewhere.times[shape, Scheme.parse(point.allocation.get(layer.name, "w16a16"))].replayed.p50
            for layer in inventory.layers
            if (shape := product(layer, 4)) is not None
        )
        assert point.costs["latency_us"] == pytest.approx(expected)
    told = done.summary["latency"]
    assert (told["profile"], told["key"], told["tokens"]) == (DEVICE, elsewhere.key, 4)
    (check,) = told["crosscheck"]
    assert check["discrepancy"] == pytest.approx(-0.2)


@pytest.mark.usefixtures("elsewhere")
def test_size_and_latency_hold_together(digits: Engine) -> None:
    done = search(digits, budgets={"latency_ms": 0.17, "avg_bits": 6.0})
    found = candidates(digits, done.id)
    assert (done.summary or {})["axes"] == ["avg_bits", "latency_us"]
    fitting = [point for point in found if point.fits]
    assert fitting
    assert all(point.costs["latency_us"] <= 170 and point.costs["avg_bits"] <= 6 for point in fitting)


@pytest.mark.usefixtures("elsewhere")
def test_the_fastest_within_a_loss_is_sought(digits: Engine) -> None:
    fastest = {"objective": "latency_ms", "points": 6, "evaluations": 8}
    done = search(digits, budgets={"loss_increase": 0.5}, optimizer=fastest)
    assert (done.summary or {})["axes"] == ["latency_us"]
    fitting = [point for point in candidates(digits, done.id) if point.fits]
    assert fitting
    assert min(fitting, key=lambda point: point.costs["latency_us"]).on_frontier


@pytest.mark.usefixtures("elsewhere")
def test_what_cannot_be_met_or_is_not_known_is_refused(digits: Engine) -> None:
    with pytest.raises(InfeasibleBudget) as infeasible:
        search(digits, budgets={"latency_ms": 0.001})
    assert infeasible.value.field == "budgets.latency_ms"
    assert infeasible.value.accepted["minimum"] > 0.05
    with pytest.raises(InvalidRequest, match="no time of") as unknown:
        search(digits, budgets={"latency_ms": 1}, latency={"profile": DEVICE, "tokens": 5})
    assert "bitfrontier latency profile digits-vit --tokens 5" in unknown.value.accepted
    with pytest.raises(InvalidRequest, match=f"there are: {DEVICE}"):
        search(digits, budgets={"latency_ms": 1}, latency={"profile": "another"})


def test_a_model_is_profiled_here_and_searched_by_that(digits: Engine, model_folder: ModelFolder) -> None:
    source = str(model_folder("digits_vit"))
    profile = profile_latency(digits, source, [1, 2], ASKED)
    assert list_profiles(digits) == [profile]
    # Ten classes of the first place of each image, and 17 places in all of its linear layers.
    assert {shape.tokens for shape, _ in profile.times if shape.rows != 10} == {17, 34, 16, 32}
    assert {shape for shape, _ in profile.times if shape.rows == 10} == {Shape(10, 64, 1), Shape(10, 64, 2)}
    patches = [scheme for shape, scheme in profile.times if shape.columns == 16]
    assert patches == [FULL_PRECISION] * 2, "no kernel multiplies by 16 inputs"
    assert {(tokens, scheme) for _, tokens, scheme in profile.checks} == {
        (tokens, scheme) for tokens in (1, 2) for scheme in (*ASKED, FULL_PRECISION)
    }
    for check in profile.checks.values():
        assert -1 < check.discrepancy < 1, "a forward pass takes no less than its layers, but for noise"

    limits = {"latency_ms": 1e3}
    done = search(digits, budgets=limits, latency={"profile": profile.device, "tokens": 2})
    assert {check["scheme"] for check in (done.summary or {})["latency"]["crosscheck"]} == {*SCHEMES, "w16a16"}


def test_the_sum_is_of_the_layers_as_they_run_in_the_forward_pass(
    digits: Engine, model_folder: ModelFolder, inventory: Inventory
) -> None:
    profile = profile_latency(digits, str(model_folder("digits_vit")), [1], ASKED[:1])
    check = profile.checks[inventory.digest, 1, ASKED[0]]
    total = 0.0
    for layer in inventory.layers:
        shape = product(layer, 1)
        assert shape is not None
        scheme = FULL_PRECISION if layer.kind == "conv" else ASKED[0]
        total += profile.times[shape, scheme].replayed.p50
    assert check.layers_us == pytest.approx(total, abs=1e-3)


def test_what_is_stored_is_not_measured_again_unless_asked(digits: Engine, model_folder: ModelFolder) -> None:
    source = str(model_folder("digits_vit"))
    first = profile_latency(digits, source, [1], ASKED[:1])
    assert profile_latency(digits, source, [1], ASKED[:1]).times == first.times
    more = profile_latency(digits, source, [1], ASKED[:2])
    assert first.times.items() < more.times.items()
    again = profile_latency(digits, source, [1], ASKED[:1], again=True)
    changed = [key for key, times in again.times.items() if times != more.times[key]]
    assert set(changed) <= set(first.times)
    assert len(changed) > len(first.times) // 2


def test_a_killed_profiling_loses_at_most_the_shape_it_was_in(
    digits: Engine, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, measured = str(model_folder("digits_vit")), 0

    def replayed(self: CpuStopwatch, calls: Any) -> Any:
        nonlocal measured
        measured += 1
        if measured > 5:
            raise KeyboardInterrupt
        return CpuStopwatch.cold(self, calls)

    monkeypatch.setattr(CpuStopwatch, "replayed", replayed)
    with pytest.raises(KeyboardInterrupt):
        profile_latency(digits, source, [1], ASKED[:1])
    (stored,) = list_profiles(digits)
    assert len(stored.times) in (3, 4, 5)


@pytest.mark.parametrize(
    ("name", "kinds"), [("tiny_llama", 5), ("tiny_gpt2", 4), ("digits_resnet", 6)], ids=lambda value: str(value)
)
def test_models_of_every_kind_are_timed_and_checked(
    engine: Engine, model_folder: ModelFolder, name: str, kinds: int
) -> None:
    profile = profile_latency(engine, str(model_folder(name)), [2], [Scheme(8, 8)])
    assert len({shape for shape, _ in profile.times}) == kinds
    assert len(profile.checks) == 2


def test_experts_are_left_out_with_a_word(
    engine: Engine, model_folder: ModelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        profile = profile_latency(engine, str(model_folder("tiny_moe")), [1], [Scheme(8, 8)])
    assert profile.times
    assert not profile.checks
    assert "which of its experts run depends on the tokens" in caplog.text
    assert "the sum over layers is not checked" in caplog.text


@pytest.mark.usefixtures("own_logs")
def test_the_command_measures_stores_and_says_so(
    digits: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process, "connect", lambda: digits)
    arguments = ["latency", "--schemes", "w8a8", "--device", "cpu", "--tokens", "1", "--tokens", "3", "digits-vit"]
    monkeypatch.setattr(sys, "argv", ["workers", *arguments])
    assert process.main() == 0
    (profile,) = list_profiles(digits)
    assert {1, 3} <= set(profile.tokens)
    printed = capsys.readouterr().out
    assert profile.key in printed
    assert f"{len(profile.times)} products and 4 forward passes" in printed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nobody"], "no registered model 'nobody'"),
        (["digits-vit", "--schemes", "int4"], "'int4' is not a scheme"),
        (["digits-vit", "--device", "tpu"], "device cannot be tpu"),
    ],
)
@pytest.mark.usefixtures("own_logs")
def test_a_command_that_cannot_be_done_says_why(
    digits: Engine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.setattr(process, "connect", lambda: digits)
    monkeypatch.setattr(sys, "argv", ["workers", "latency", *arguments])
    assert process.main() == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("tokens", ["0", "-1", "many", "1000001"])
def test_tokens_are_a_whole_number(monkeypatch: pytest.MonkeyPatch, tokens: str) -> None:
    monkeypatch.setattr(sys, "argv", ["workers", "latency", "digits-vit", f"--tokens={tokens}"])
    with pytest.raises(SystemExit, match="2"):
        process.main()
