"""The size of a model against the memory that is free: refused before a weight is read, with what is short."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import psutil
import pytest
import torch

from search.errors import ModelTooLarge, UnsupportedModel
from tests.workers.conftest import ModelFolder
from workers import memory
from workers.memory import BESIDES, LOADING, SEARCHING, check_fits, free_bytes
from workers.models import load_model

CPU = torch.device("cpu")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """18.9 GB are free."""
    monkeypatch.setattr(memory, "free_bytes", lambda _device: 18_900_000_000)


class TestCheck:
    def test_names_what_is_needed_what_is_free_and_what_is_short(self, free: None) -> None:
        weights = int((540.2e9 - BESIDES) / SEARCHING / 4)
        with pytest.raises(ModelTooLarge) as refused:
            check_fits("huge", weights, 4, CPU)
        problem = refused.value.problem()
        assert problem["type"] == "urn:bitfrontier:problem:model-too-large"
        assert problem["field"] == "model"
        assert "huge needs 540.2 GB and 18.9 GB are free on this machine: 521.3 GB short" in problem["detail"]
        assert "BITFRONTIER_DTYPE=bfloat16" in problem["detail"]
        assert problem["accepted"] == "a model that needs at most 18.9 GB"

    def test_what_fits_passes(self, free: None) -> None:
        check_fits("fits", int((18.9e9 - BESIDES) / SEARCHING / 4), 4, CPU)

    def test_in_bfloat16_a_search_takes_half_but_loading_does_not(self, free: None) -> None:
        most = int(min((18.9e9 - BESIDES) / (SEARCHING * 2), 18.9e9 / (LOADING * 4)))
        check_fits("fits", most, 2, CPU)
        with pytest.raises(ModelTooLarge):
            check_fits("large", most + 10, 2, CPU)


class TestFree:
    def test_is_what_the_machine_has_at_most(self) -> None:
        assert 0 < free_bytes(CPU) <= psutil.virtual_memory().total

    @pytest.mark.parametrize(
        ("limits", "left"),
        [
            ({"": ("max", 0, 0)}, []),
            ({"": ("max", 0, 0), "pod": ("1000", 700, 100)}, [400]),
            ({"": ("max", 0, 0), "pod": ("1000", 700, 0), "pod/worker": ("500", 900, 0)}, [0, 300]),
        ],
    )
    def test_is_what_each_limit_of_the_container_leaves(
        self, tmp_path: Path, limits: dict[str, tuple[str, int, int]], left: list[int]
    ) -> None:
        for group, (most, used, cached) in limits.items():
            (tmp_path / group).mkdir(exist_ok=True)
            (tmp_path / group / "memory.max").write_text(f"{most}\n")
            (tmp_path / group / "memory.current").write_text(f"{used}\n")
            (tmp_path / group / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
        found = memory._headrooms(tmp_path, "/pod/worker", "memory.max", "memory.current", "inactive_file")
        assert found == left


class TestModels:
    def test_a_model_that_is_too_large_is_refused_before_it_is_read(
        self, model_folder: ModelFolder, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(model_folder("tiny_llama"), tmp_path / "huge")
        config = json.loads((folder / "config.json").read_text())
        rows = 2**34 // config["hidden_size"]
        changed = {"vocab_size": rows, "tie_word_embeddings": True, "num_hidden_layers": 1}
        (folder / "config.json").write_text(json.dumps(config | changed))
        sparse(folder / "model.safetensors", "model.embed_tokens.weight", (rows, config["hidden_size"]))
        # Who read it would have no memory left.
        with pytest.raises(ModelTooLarge, match=r"huge needs \d+\.\d GB and .* GB short"):
            load_model(str(folder), CPU)

    def test_a_configuration_may_not_describe_more_than_the_files_hold(
        self, model_folder: ModelFolder, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(model_folder("tiny_llama"), tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2**40}))
        with pytest.raises(UnsupportedModel, match="its configuration describes 140,737,"):
            load_model(str(folder), CPU)


def sparse(file: Path, tensor: str, shape: tuple[int, int]) -> None:
    """A safetensors file of one tensor, of which nothing but the header takes room on the disk."""
    length = 4 * shape[0] * shape[1]
    head = json.dumps({tensor: {"dtype": "F32", "shape": shape, "data_offsets": [0, length]}}).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head)
    os.truncate(file, 8 + len(head) + length)
