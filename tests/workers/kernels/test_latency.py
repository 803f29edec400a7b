"""How products are timed, here on a CPU by the reference; the same on a CUDA device."""

import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

from search.latency_profile import Shape, Times, read_profile
from search.scheme import FULL_PRECISION, Scheme
from workers.kernels import latency, stopwatch
from workers.kernels.errors import KernelError
from workers.kernels.latency import SCHEMES, Bench, measured, sources_digest
from workers.kernels.stopwatch import CpuStopwatch, quantiles

WITHOUT_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, WITHOUT_GPU])]


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "CPU_CACHE", 2**20)
    monkeypatch.setattr(CpuStopwatch, "cache_bytes", 2**20)


def sleeping(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def test_quantiles_are_of_what_was_measured() -> None:
    found = quantiles([float(value) for value in range(101)])
    assert (found.p10, found.p50, found.p90) == (10, 50, 90)
    assert quantiles([0.0]).p50 > 0, "a clock may not have moved"


def test_a_call_takes_as_long_as_it_takes() -> None:
    watch = CpuStopwatch()
    for found in (watch.replayed([sleeping(2e-3)] * 2), watch.cold([sleeping(2e-3)])):
        assert 2000 <= found.p10 <= found.p50 < 1_000_000


def test_calls_take_turns() -> None:
    calls: list[int] = []
    CpuStopwatch().replayed([lambda at=at: calls.append(at) for at in range(5)])  # type: ignore[misc]
    turns = calls[stopwatch.WARM :]
    assert turns == [at % 5 for at in range(stopwatch.REPLAYS)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", ["w4a16g32", "w6a8", "w4a4", "w16a16"])
def test_a_product_is_timed_either_way(device: str, scheme: str) -> None:
    bench = Bench.on(device)
    found = bench.measure(Shape(96, 64, 5), Scheme.parse(scheme))
    for times in (found.replayed, found.cold):
        assert 0 < times.p10 <= times.p50 <= times.p90 < 1e6


@pytest.mark.gpu
@WITHOUT_GPU
def test_a_weight_comes_from_memory() -> None:
    """8192 × 8192 weights of 4 bits would fit the cache of an H100; no memory reads them in less than 4 µs."""
    found = Bench.on("cuda").measure(Shape(8192, 8192, 1), Scheme(4, 16, 128))
    assert found.replayed.p50 > 4


def test_copies_are_together_larger_than_the_cache() -> None:
    bench = Bench.on("cpu")
    for rows in (64, 256, 2048):
        calls = bench._calls(Shape(rows, 1024, 1), FULL_PRECISION)
        weights = [call.args[1] for call in calls]  # type: ignore[attr-defined]
        assert len({weight.data_ptr() for weight in weights}) == len(weights) >= 4
        assert sum(weight.nbytes for weight in weights) > 3 * bench.watch.cache_bytes


def test_what_no_kernel_multiplies_is_refused_and_the_others_are_timed() -> None:
    found: dict[str, Times | KernelError] = {}

    def done(product: tuple[Shape, Scheme], times: Times | KernelError) -> None:
        found[f"{product[1]} of {product[0].columns}"] = times

    asked = [FULL_PRECISION, Scheme(7), Scheme(4, 16, 64), Scheme(8, 16, None, symmetric=False)]
    measured(Bench.on("cpu"), [Shape(8, 32, 1), Shape(8, 64, 1)], asked, done)
    timed = [name for name, times in found.items() if isinstance(times, Times)]
    assert timed == ["w16a16 of 32", "w4a16g64 of 64", "w16a16 of 64"]
    assert "multiple of 64" in str(found["w4a16g64 of 32"])
    assert "no kernel multiplies w7a16" in str(found["w7a16 of 64"])
    assert "no kernel multiplies w8a16asym" in str(found["w8a16asym of 64"])


def test_every_scheme_that_kernels_know_can_be_timed() -> None:
    assert len(SCHEMES) == 5 * 4 * 4 + 1
    for scheme in SCHEMES:
        assert Bench.on("cpu")._calls(Shape(1, 128, 1), scheme)[0]() is not None


def test_a_device_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(KernelError, match=r"device cannot be cuda:99; accepted: .*'cpu'"):
        Bench.on("cuda:99")
    with pytest.raises(KernelError, match="device cannot be tpu"):
        Bench.on("tpu")


def test_a_profile_says_where_and_by_what_it_was_measured() -> None:
    profile = Bench.on("cpu").profile()
    assert (profile.backend, profile.dtype, profile.sources) == ("reference", "float32", sources_digest())
    assert profile.device
    assert str(torch.get_num_threads()) in profile.driver
    assert torch.__version__ in profile.driver


def test_a_bare_machine_prints_a_profile() -> None:
    """Without pydantic or a database: only torch and NumPy."""
    script = (
        "import sys, workers.kernels.latency as latency; "
        "assert not {'pydantic', 'sqlalchemy', 'transformers', 'ray', 'pandas'} & set(sys.modules); "
        "sys.argv[1:] = ['64x32', '1x64', '--tokens', '1', '--tokens', '3', '--schemes', 'w8a8,w4a16g64']; "
        "sys.exit(latency.main())"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    profile = read_profile(ran.stdout)
    assert profile.tokens == [1, 3]
    assert len(profile.times) == 2 * (2 + 3)
    assert "w4a16g64 of 64 × 32 by 1 token left out" in ran.stderr


@pytest.mark.parametrize("shape", ["64", "64x", "0x32", "-1x32", "64x32x2"])
def test_a_shape_is_rows_and_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shape: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["latency", "--device", "cpu", "--", shape])
    assert latency.main() == 1
    assert "ROWSxCOLUMNS" in capsys.readouterr().err
