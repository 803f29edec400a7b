"""Weights that the processes of a machine share."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from tests.workers.gguf_file import write_gguf
from workers.models import LoadedModel, load_model
from workers.settings import Dtype
from workers.sharing import is_mapped

CPU = torch.device("cpu")
TOKENS = {"input_ids": torch.tensor([[1, 5, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Callable[[str], Path]) -> Iterator[Path]:
    """Where shared weights are kept, of models that are in a root."""
    roots = [tmp_path, *{model_folder(name).parent for name in ("tiny_llama", "tiny_moe", "tiny_bert", "tiny_gpt2")}]
    monkeypatch.setenv("BITFRONTIER_MODELS", ":".join(map(str, roots)))
    monkeypatch.setenv("BITFRONTIER_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "cache" / "weights"


@pytest.fixture(params=["fused experts", "gguf", "bfloat16"])
def source(
    request: pytest.FixtureRequest, cache: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> tuple[str, Dtype]:
    """A model whose weights the library converts, and what it computes in."""
    if request.param == "gguf":
        write_gguf(LlamaForCausalLM.from_pretrained(model_folder("tiny_llama")), tmp_path / "tiny.gguf")
        return str(tmp_path / "tiny.gguf"), "float32"
    if request.param == "bfloat16":
        return str(model_folder("tiny_gpt2")), "bfloat16"
    return str(model_folder("tiny_moe")), "float32"


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def shared(source: tuple[str, Dtype]) -> LoadedModel:
    return load_model(source[0], CPU, source[1], shared=True)


def test_weights_that_have_to_be_converted_are_converted_once_and_mapped(
    source: tuple[str, Dtype], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = load_model(source[0], CPU, source[1])
    assert not is_mapped(private.model)
    first = shared(source)
    monkeypatch.setattr("workers.models._check_finite", lambda *_: pytest.fail("converted again"))
    second = shared(source)
    assert len(list(cache.glob("*.safetensors"))) == 1
    for loaded in (first, second):
        assert is_mapped(loaded.model)
        assert type(loaded.model) is type(private.model)
        assert loaded.digest == private.digest
        assert same(loaded.model, private.model)
        with torch.no_grad():
            assert torch.equal(loaded(TOKENS), private(TOKENS))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
def test_weights_in_what_the_model_computes_in_are_mapped_as_they_are(
    name: str, cache: Path, model_folder: Callable[[str], Path]
) -> None:
    for _ in range(2):
        assert is_mapped(load_model(str(model_folder(name)), CPU, shared=True).model)
    assert not list(cache.glob("*.safetensors"))


def test_nobody_sees_what_another_does_to_shared_weights(source: tuple[str, Dtype]) -> None:
    first, second = shared(source), shared(source)
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter.zero_()
    assert not same(first.model, second.model)
    assert same(shared(source).model, second.model)


def test_a_damaged_file_is_not_used(source: tuple[str, Dtype], cache: Path) -> None:
    expected = shared(source)
    (file,) = cache.glob("*.safetensors")
    file.unlink()
    file.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    assert same(shared(source).model, expected.model)
    assert not file.exists()


def test_on_a_full_disk_what_was_not_used_for_longest_goes_and_then_weights_are_private(
    source: tuple[str, Dtype], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True)
    for name in ("old", "older"):
        (cache / f"{name}.safetensors").touch()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    loaded = shared(source)
    assert not list(cache.glob("*.safetensors"))
    assert same(loaded.model, load_model(source[0], CPU, source[1]).model)
