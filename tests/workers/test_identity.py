"""Nothing is computed, or stored, by an evaluator that has another model or other data than the search described."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sqlalchemy import Engine, select

from db.models import put_model
from db.searches import get_search
from db.tables import ResultRow
from search.request import Calibration
from tests.workers.searching import ask, claim
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.fingerprint import ModelChanged, fingerprint, unchanged
from workers.pipeline import run_search
from workers.pools import Function, InProcessPool
from workers.tasks import Checked, Content, Item, Result


def name_layers(evaluator: Evaluator, _item: Item) -> Result:
    return {"layers": len(evaluator.layers)}


def spoil_weights(folder: Path) -> None:
    """As a copy over the file would; all that a fingerprint looks at stays, as where another machine has another."""
    file = folder / "model.safetensors"
    stat, weights = file.stat(), load_file(file)
    for tensor in weights.values():
        tensor *= 1.5
    save_file(weights, folder / "other", {"format": "pt"})
    file.write_bytes((folder / "other").read_bytes())
    (folder / "other").unlink()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


class Elsewhere(InProcessPool):
    """Has the model described by an evaluator, and computes with one that finds other files."""

    def __init__(self, spec: EvaluatorSpec, spoil: Callable[[], None]) -> None:
        super().__init__(spec)
        self.spoil, self.maps = spoil, 0

    def map(self, function: Function, items: Sequence[Item], **stopping: Any) -> Iterator[tuple[int, Result]]:
        yield from super().map(function, items, **stopping)
        self.maps += 1
        if self.maps == 1:
            self.spoil()
            self.close()


@pytest.fixture
def copy(digits: Engine, model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """The folder of a model of its own, registered as "copy"."""
    shutil.copytree(model_folder("digits_vit"), tmp_path / "copy")
    put_model(digits, "copy", str(tmp_path / "copy"), None)
    return tmp_path / "copy"


def stored(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return [row.kind for row in connection.execute(select(ResultRow.kind))]


def search_with(engine: Engine, spoil: Callable[[], None], **asked: object) -> ModelChanged:
    search, pools = ask(engine, **asked), []

    def pool_for(spec: EvaluatorSpec) -> Elsewhere:
        pools.append(Elsewhere(spec, spoil))
        return pools[-1]

    with pytest.raises(ModelChanged) as refused:
        run_search(engine, claim(engine), pool_for, lambda: None)
    assert [pool.maps for pool in pools] == [1], "nothing was computed after the description"
    assert get_search(engine, search.id).state == "running", "the worker says how it ends"
    return refused.value


def test_an_evaluator_that_finds_other_weights_refuses_and_nothing_is_stored(digits: Engine, copy: Path) -> None:
    refused = search_with(digits, lambda: spoil_weights(copy), model="copy")
    assert refused.problem()["type"].endswith("model-changed")
    assert "the files of 'copy' changed while it was searched, or differ on another machine" in refused.detail
    # Nor the description: the next search must not believe it either.
    assert stored(digits) == []


def test_an_evaluator_that_finds_other_data_refuses(digits: Engine, datasets_folder: Path) -> None:
    file = datasets_folder / "digits.npz"

    def spoil() -> None:
        arrays = dict(np.load(file))
        np.savez(file, images=arrays["images"] // 2, labels=arrays["labels"])

    refused = search_with(digits, spoil, calibration={"dataset": "digits", "samples": 64})
    assert refused.field == "calibration.dataset"
    assert stored(digits) == []


def test_who_has_what_was_described_computes(model_folder: Callable[[str], Path]) -> None:
    evaluator = Evaluator.build(
        EvaluatorSpec(str(model_folder("tiny_llama")), Calibration(samples=2, sequence_length=8))
    )
    same = Content(evaluator.loaded.digest, evaluator.data.digest, "rtn")
    assert Checked(name_layers, "m", same)(evaluator, {}) == name_layers(evaluator, {})
    for other in (replace(same, model_digest="other"), replace(same, data_digest="other")):
        with pytest.raises(ModelChanged):
            Checked(name_layers, "m", other)(evaluator, {})
    assert Checked(name_layers, "m", same).__name__ == "name_layers", "what a time limit calls it"


def test_files_that_change_while_they_are_read_are_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    with unchanged("m", file):
        assert fingerprint(file)
    with pytest.raises(ModelChanged, match="the files of 'm' changed while they were read"), unchanged("m", file):
        file.write_bytes(b"another")
