"""The fastest plan is remembered for what it was timed on, and for nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

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

    def test_begins_anew_where_the_file_is_not_json(self, nothing_chosen: Path) -> None:
        autotune.cache_file().parent.mkdir()
        autotune.cache_file().write_text("{")
        assert autotune.chosen(self.PROBLEM) == default(self.PROBLEM)
        autotune.remember(self.PROBLEM, candidates(self.PROBLEM)[1], 1.0)
        assert autotune.recalled(self.PROBLEM) == candidates(self.PROBLEM)[1]


def test_the_fastest_is_the_one_that_took_least(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = candidates(TestMemory.PROBLEM)
    times = {plan: 10.0 - (index == 5) for index, plan in enumerate(plans)}
    monkeypatch.setattr(autotune, "graph_microseconds", lambda runs: runs[0]())
    assert autotune.fastest(plans, lambda plan: [lambda: times[plan]]) == (plans[5], 9.0)
