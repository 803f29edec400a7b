"""The fastest plan is remembered for what it was timed on, and for nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from search.scheme import Scheme
from workers.kernels import autotune
from workers.kernels.plans import (
    Machine,
    Plan,
    Problem,
    candidates,
    default,
)

H100 = Machine("H100", 13000, "sm_90a", 132)


@pytest.fixture
def nothing_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a memory as empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_CHOSEN", {})
    return tmp_path


class TestMemory:
    PROBLEM = Problem(H100, Scheme(6, 8), 8192, 8192, 1, torch.float16)

    def test_without_an_entry_is_the_default(self, nothing_chosen: Path) -> None:
        assert autotune.chosen(self.PROBLEM) == default(self.PROBLEM)
        assert not autotune.cache_file().exists()

    def test_lasts_beyond_the_process(self, nothing_chosen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert autotune.chosen(self.PROBLEM) == default(self.PROBLEM)
        plans = candidates(self.PROBLEM)
        autotune.remember(self.PROBLEM, plans[3], 12.5)
        assert autotune.chosen(self.PROBLEM) == plans[3]
        monkeypatch.setattr(autotune, "_CHOSEN", {})
        assert autotune.chosen(self.PROBLEM) == plans[3]

    def test_keeps_what_others_remembered(self, nothing_chosen: Path) -> None:
        other = replace(self.PROBLEM, rows=4096)
        for problem in (self.PROBLEM, other):
            autotune.remember(problem, candidates(problem)[1], 1.0)
        assert len(json.loads(autotune.cache_file().read_text())) == 2
        assert autotune.recalled(other) == candidates(other)[1]
        assert [path.name for path in autotune.cache_file().parent.iterdir()] == ["plans.json"]

    @pytest.mark.parametrize(
        "change",
        [
            {"machine": replace(H100, name="H200")},
            {"machine": replace(H100, driver=12080)},
            {"machine": replace(H100, multiprocessors=114)},
            {"scheme": Scheme(4, 8)},
            {"scheme": Scheme(6, 6)},
            {"rows": 4096},
            {"columns": 4096},
            {"tokens": 2},
            {"dtype": torch.bfloat16},
        ],
        ids=str,
    )
    def test_is_of_one_problem_alone(self, nothing_chosen: Path, change: dict[str, object]) -> None:
        autotune.remember(self.PROBLEM, candidates(self.PROBLEM)[1], 1.0)
        assert autotune.recalled(replace(self.PROBLEM, **change)) is None

    def test_is_of_one_text_of_the_kernels(self, nothing_chosen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        autotune.remember(self.PROBLEM, candidates(self.PROBLEM)[1], 1.0)
        monkeypatch.setattr(autotune, "sources_digest", lambda: "another")
        assert autotune.recalled(self.PROBLEM) is None

    def test_passes_over_what_no_longer_is_a_candidate(self, nothing_chosen: Path) -> None:
        autotune.remember(self.PROBLEM, Plan(default(self.PROBLEM).kernel, slices=99), 1.0)
        assert autotune.recalled(self.PROBLEM) is None

    @pytest.mark.parametrize("content", [b"{", b"", b"[]", b"null", b'"plans"', b"\xff\xfe{", b"[" * 100_000])
    def test_begins_anew_where_the_file_has_no_plans(self, nothing_chosen: Path, content: bytes) -> None:
        autotune.cache_file().parent.mkdir()
        autotune.cache_file().write_bytes(content)
        assert autotune.chosen(self.PROBLEM) == default(self.PROBLEM)
        autotune.remember(self.PROBLEM, candidates(self.PROBLEM)[1], 1.0)
        assert autotune.recalled(self.PROBLEM) == candidates(self.PROBLEM)[1]

    @pytest.mark.parametrize("entry", [{}, [], None, 7, {"kernel": [], "slices": {}}, {"kernel": "decode"}], ids=str)
    def test_passes_over_an_entry_that_is_no_plan(self, nothing_chosen: Path, entry: object) -> None:
        autotune.cache_file().parent.mkdir()
        autotune.cache_file().write_text(json.dumps({autotune.key(self.PROBLEM): entry}))
        assert autotune.chosen(self.PROBLEM) == default(self.PROBLEM)

    def test_is_of_this_process_alone_where_the_file_cannot_be_written(self, nothing_chosen: Path) -> None:
        autotune.cache_file().mkdir(parents=True)
        assert autotune.chosen(self.PROBLEM) == default(self.PROBLEM)
        plan = candidates(self.PROBLEM)[1]
        with pytest.warns(UserWarning, match="forgotten when this process ends"):
            autotune.remember(self.PROBLEM, plan, 1.0)
        assert autotune.chosen(self.PROBLEM) == plan
        assert list(autotune.cache_file().parent.iterdir()) == [autotune.cache_file()]

    def test_is_the_default_where_the_file_may_not_be_read(
        self, nothing_chosen: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def forbidden(path: Path, *arguments: object, **options: object) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "open", forbidden)
        monkeypatch.setattr(autotune, "sources_digest", lambda: "any")
        assert autotune.chosen(self.PROBLEM) == default(self.PROBLEM)


class FakeCuda:
    """Of `torch.cuda` what timing uses, with two devices; a stream is the number of its device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.timed = 0, []
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self)
        monkeypatch.setattr(autotune, "_capture_stream", autotune._capture_stream.__wrapped__)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before

    @contextmanager
    def graph(self, graph: object, stream: int = 0) -> Iterator[None]:
        # Torch's own stream for captures lies on the device that was current at the first: here 0.
        assert stream == self.current
        yield

    def record(self) -> None:
        self.timed.append(self.current)

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: object) -> float:
        return 1.0


def test_times_are_taken_on_the_device_that_the_work_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, ran = FakeCuda(monkeypatch), set()
    (plan, *_) = candidates(TestMemory.PROBLEM)
    found = autotune.fastest([plan], lambda plan: [lambda: ran.add(cuda.current)], torch.device("cuda", 1))
    assert found == (plan, 500.0)
    assert (ran, set(cuda.timed), cuda.current) == ({1}, {1}, 0)


def test_the_fastest_is_the_one_that_took_least(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    plans = candidates(TestMemory.PROBLEM)
    times = {plan: 10.0 - (index == 5) for index, plan in enumerate(plans)}
    monkeypatch.setattr(autotune, "graph_microseconds", lambda runs: runs[0]())
    assert autotune.fastest(plans, lambda plan: [lambda: times[plan]], torch.device("cuda", 0)) == (plans[5], 9.0)
