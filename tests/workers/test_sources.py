"""Where models come from: what lies in the models roots, and nothing else by any name, link or index."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from search.errors import InvalidRequest, UnsupportedModel
from search.names import HUB
from tests.workers.conftest import ModelFolder
from workers import sources
from workers.models import load_model
from workers.sources import find_model, gather, locate, models_roots, register

INDEX = "model.safetensors.index.json"
WHOLE = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "1_Pooling/config.json"}
"""What is read of `outside`."""


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two models roots; what lies beside them is out of bounds."""
    both = tmp_path / "first", tmp_path / "second"
    for root in both:
        root.mkdir()
    monkeypatch.setenv("BITFRONTIER_MODELS", os.pathsep.join(map(str, both)))
    return both


@pytest.fixture
def outside(model_folder: ModelFolder, tmp_path: Path) -> Path:
    """A model's folder outside of the roots, with things beside the model."""
    folder = shutil.copytree(model_folder("tiny_llama"), tmp_path / "outside")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "code.py").write_text("raise SystemExit('code ran')")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    return folder


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UnsupportedModel) as refused:
        action()
    assert refused.value.field == "model"
    return refused.value.detail


def shard(folder: Path) -> dict[str, object]:
    """Spread the weights over two shards; the index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for place in set(places.values()):
        save_file({name: weights[name] for name in names if places[name] == place}, folder / place, {"format": "pt"})
    total = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index))
    return index


class TestRoots:
    def test_by_default_the_folder_models_of_the_data_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("BITFRONTIER_MODELS")
        monkeypatch.setenv("BITFRONTIER_DATA", str(tmp_path))
        assert models_roots()[0] == tmp_path / "models"
        assert len(models_roots()) == 2

    def test_a_source_is_found_in_any_of_them(self, roots: tuple[Path, Path], outside: Path) -> None:
        home = shutil.copytree(outside, roots[1] / "family" / "tiny")
        assert locate("family/tiny") == home
        assert find_model("family/tiny").name == "tiny"

    def test_a_root_may_lie_elsewhere_on_another_machine(
        self, roots: tuple[Path, Path], outside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, _ = register("mine", str(outside))
        roots[0].rename(tmp_path / "moved")
        monkeypatch.setenv("BITFRONTIER_MODELS", str(tmp_path / "moved"))
        assert locate(source) == tmp_path / "moved" / "mine"

    @pytest.mark.parametrize(
        "source", ["", ".", "..", "../outside", "nothing", "tiny/../../outside", "linked", "loop", "/", "/etc/passwd"]
    )
    def test_what_is_in_none_is_no_model(self, roots: tuple[Path, Path], outside: Path, source: str) -> None:
        shutil.copytree(outside, roots[0] / "tiny")
        (roots[0] / "linked").symlink_to(outside)
        (roots[0] / "loop").symlink_to(roots[0] / "loop")
        assert "in the models roots" in refusal(lambda: find_model(source))

    def test_nor_is_an_absolute_path_outside(self, roots: tuple[Path, Path], outside: Path) -> None:
        assert "in the models roots" in refusal(lambda: find_model(str(outside)))

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"])
    def test_a_link_out_of_them_is_refused(self, roots: tuple[Path, Path], outside: Path, name: str) -> None:
        home = shutil.copytree(outside, roots[0] / "tiny")
        (home / name).unlink()
        (home / name).symlink_to(outside / name)
        said = refusal(lambda: load_model("tiny", torch.device("cpu")))
        assert said == f"{name} of tiny is a link to a file outside of the models roots"

    def test_a_folder_of_links_into_them_is_a_model(self, roots: tuple[Path, Path], outside: Path) -> None:
        home = shutil.copytree(outside, roots[1] / "tiny")
        (roots[0] / "view").mkdir()
        for file in home.iterdir():
            (roots[0] / "view" / file.name).symlink_to(file)
        assert load_model("view", torch.device("cpu")).digest == load_model("tiny", torch.device("cpu")).digest

    @pytest.mark.parametrize("name", ["http://host/model", "file:///etc", "org/name/more", "../org/name", "a b", "x\n"])
    def test_no_address_is_asked_for(self, name: str) -> None:
        assert "neither a registered model nor" in refusal(lambda: find_model(HUB + name))


class TestOpened:
    def test_holds_what_is_read_and_nothing_else(self, outside: Path) -> None:
        with gather(outside).opened() as folder:
            held = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        assert held == WHOLE
        assert not folder.exists()

    def test_a_link_that_is_changed_later_is_not_followed(self, outside: Path, tmp_path: Path) -> None:
        (tmp_path / "other.json").write_text("{}")
        (outside / "config.json").rename(tmp_path / "config.json")
        (outside / "config.json").symlink_to(tmp_path / "config.json")
        found = gather(outside)
        (outside / "config.json").unlink()
        (outside / "config.json").symlink_to(tmp_path / "other.json")
        with found.opened() as folder:
            assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


class TestRegister:
    def test_brings_in_what_lies_outside(self, roots: tuple[Path, Path], outside: Path) -> None:
        source, done = register("mine", str(outside))
        home = roots[0] / "mine"
        assert source == "mine"
        assert done == f"linked {size_of(home):.1f} MB into {home}"
        brought = {str(file.relative_to(home)) for file in home.rglob("*") if file.is_file()}
        assert brought == WHOLE | {"generation_config.json"}
        assert (home / "model.safetensors").samefile(outside / "model.safetensors")
        assert list(roots[0].iterdir()) == [home]
        assert load_model(source, torch.device("cpu")).digest == load_model_of(outside)

    def test_copies_where_it_cannot_link(
        self, roots: tuple[Path, Path], outside: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def another_file_system(*_paths: object) -> None:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", another_file_system)
        _, done = register("mine", str(outside))
        assert done == f"copied {size_of(roots[0] / 'mine'):.1f} MB into {roots[0] / 'mine'}"
        assert not (roots[0] / "mine" / "model.safetensors").samefile(outside / "model.safetensors")
        assert register("mine", str(outside)) == ("mine", f"{roots[0] / 'mine'} holds it already")

    def test_a_gguf_file(self, roots: tuple[Path, Path], tmp_path: Path) -> None:
        (tmp_path / "weights.gguf").write_bytes(b"GGUF")
        assert register("mine", str(tmp_path / "weights.gguf"))[0] == "mine.gguf"
        assert (roots[0] / "mine.gguf").read_bytes() == b"GGUF"

    def test_what_lies_inside_stays_where_it_is(self, roots: tuple[Path, Path], outside: Path) -> None:
        shutil.copytree(outside, roots[1] / "family" / "tiny")
        assert register("mine", str(roots[1] / "family" / "tiny")) == ("family/tiny", None)
        assert not list(roots[0].iterdir())

    def test_what_a_namesake_hides_is_refused(self, roots: tuple[Path, Path], outside: Path) -> None:
        for root in roots:
            shutil.copytree(outside, root / "tiny")
        assert "is hidden by" in refusal(lambda: register("mine", str(roots[1] / "tiny")))

    def test_nothing_is_overwritten_unasked(self, roots: tuple[Path, Path], outside: Path, tmp_path: Path) -> None:
        register("mine", str(outside))
        other = shutil.copytree(outside, tmp_path / "other")
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
        assert "exists and holds something else" in refusal(lambda: register("mine", str(other)))
        register("mine", str(other), replace=True)
        assert (roots[0] / "mine" / "config.json").read_bytes() == (other / "config.json").read_bytes()
        assert list(roots[0].iterdir()) == [roots[0] / "mine"]

    def test_a_failure_leaves_nothing_behind(
        self, roots: tuple[Path, Path], outside: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_paths: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "link", full)
        monkeypatch.setattr(shutil, "copy2", full)
        with pytest.raises(OSError, match="No space left"):
            register("mine", str(outside))
        assert not list(roots[0].iterdir())

    def test_a_hub_id_is_taken_as_it_is(self, roots: tuple[Path, Path]) -> None:
        assert register("mine", "org/name") == ("hub:org/name", None)

    @pytest.mark.parametrize("name", ["", "../mine", "a/b/c", "/mine", "mine\n", "http://host", ".hidden", "a" * 201])
    def test_a_name_is_no_path(self, roots: tuple[Path, Path], outside: Path, name: str) -> None:
        with pytest.raises(InvalidRequest, match="is not the name of a model"):
            register(name, str(outside))

    @pytest.mark.parametrize("given", ["/no/such/folder", "./missing", "missing", "https://host/org/name"])
    def test_what_is_nowhere(self, roots: tuple[Path, Path], given: str) -> None:
        assert f"there is no folder or file '{given}' here" in refusal(lambda: register("mine", given))


class TestKinds:
    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("pytorch_model.bin", "a pickle, which can run code"),
            ("model.pt", "a pickle, which can run code"),
            ("model.pth", "a pickle, which can run code"),
            ("last.ckpt", "a pickle, which can run code"),
            ("model.pkl", "a pickle, which can run code"),
            ("weights.npy", "an array that may hold a pickle"),
            ("tf_model.h5", "a Keras file"),
            ("flax_model.msgpack", "a Flax file"),
            ("model.onnx", "an ONNX graph"),
        ],
    )
    def test_weights_that_are_not_read(self, tmp_path: Path, name: str, says: str) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / name).write_bytes(b"\x00")
        assert f"{tmp_path.name} has no safetensors weights; {name} is {says}" in refusal(lambda: gather(tmp_path))
        assert f"{name} is {says}" in refusal(lambda: gather(tmp_path / name))

    def test_weights_alone(self, outside: Path) -> None:
        assert "holds weights, and no configuration" in refusal(lambda: gather(outside / "model.safetensors"))

    def test_settings_out_of_all_proportion(self, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sources, "MOST_SETTINGS_BYTES", 1000)
        assert "tokenizer.json of outside has 0.0" in refusal(lambda: gather(outside))


class TestShards:
    def test_are_read_by_their_index(self, roots: tuple[Path, Path], outside: Path) -> None:
        home = shutil.copytree(outside, roots[0] / "tiny")
        whole = load_model("tiny", torch.device("cpu")).model.state_dict()
        shard(home)
        sharded = load_model("tiny", torch.device("cpu")).model.state_dict()
        assert whole.keys() == sharded.keys()
        assert all(torch.equal(whole[name], sharded[name]) for name in whole)

    @pytest.mark.parametrize(
        "name",
        [
            "../secret.safetensors",
            "/etc/secret.safetensors",
            "sub/x.safetensors",
            "..",
            "",
            "a\\b.safetensors",
            "w.bin",
        ],
    )
    def test_of_another_folder_are_refused(self, outside: Path, name: str) -> None:
        (outside.parent / "secret.safetensors").write_bytes(b"")
        index = shard(outside)
        assert isinstance(index["weight_map"], dict)
        index["weight_map"]["lm_head.weight"] = name
        (outside / INDEX).write_text(json.dumps(index))
        assert "which is no safetensors file of its folder" in refusal(lambda: gather(outside))

    @pytest.mark.parametrize(
        ("index", "says"),
        [
            ("{", "cannot be read"),
            ("[]", "it is no JSON object"),
            ("{}", "does not say which file holds which tensor"),
            ('{"weight_map": {"a": 1}}', "does not say which file holds which tensor"),
            ('{"weight_map": {"a": "model-3.safetensors"}}', "lacks model-3.safetensors (1 of its 1 shards)"),
        ],
    )
    def test_an_index_that_makes_no_sense(self, outside: Path, index: str, says: str) -> None:
        shard(outside)
        (outside / INDEX).write_text(index)
        assert says in refusal(lambda: gather(outside))

    @pytest.mark.parametrize("total", [10**18, -1, "much", float("nan"), True])
    def test_an_index_that_claims_another_size(self, outside: Path, total: object) -> None:
        index = shard(outside)
        (outside / INDEX).write_text(json.dumps(index | {"metadata": {"total_size": total}}))
        assert "bytes of weights, and its shards have" in refusal(lambda: gather(outside))


def size_of(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def load_model_of(folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITFRONTIER_MODELS", str(folder.parent))
        return load_model(folder.name, torch.device("cpu")).digest
