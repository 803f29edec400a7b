"""Damaged and hostile weight files: refused with a message, or loaded; never another error or a hang."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from search.errors import UnsupportedModel
from tests.workers.conftest import ModelFolder
from tests.workers.gguf_file import write_gguf
from workers.headers import MOST_TENSORS, MOST_VALUES, read_gguf, read_safetensors
from workers.models import load_model

CPU = torch.device("cpu")
STRING, ARRAY, UINT8, UINT32 = 8, 9, 0, 4
"""Types of the values of a GGUF file's settings."""


@pytest.fixture(scope="module")
def weights(model_folder: ModelFolder) -> Path:
    """A whole safetensors file."""
    return model_folder("tiny_llama") / "model.safetensors"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole GGUF file, as small as it can be."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(LlamaForCausalLM(config), file)
    return file


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def header(*, tensors: int = 0, pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def setting(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def safetensors(about: object, length: int | None = None, data: bytes = b"") -> bytes:
    head = json.dumps(about).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + data


class TestSafetensors:
    def test_names_and_shapes(self, weights: Path) -> None:
        assert read_safetensors(weights, "w") == {name: tuple(one.shape) for name, one in load_file(weights).items()}

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"", "it is empty"),
            (b"\x10", "eader"),
            (safetensors({}, length=2**63), "eader"),
            (safetensors({}, length=99), "eader"),
            (safetensors([1]), "eader"),
            (b"\x02" + bytes(7) + b"{{", "eader"),
            (safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}), "eader"),
            (safetensors({"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 4]}}, data=bytes(4)), "eader"),
            (safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}), "eader"),
            (safetensors({"a": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}, data=bytes(4)), "eader"),
            (safetensors(json.loads("[" * 900 + "]" * 900)), "eader"),
        ],
    )
    def test_what_is_damaged(self, tmp_path: Path, content: bytes, says: str) -> None:
        assert says in refusal(read_safetensors, tmp_path / "model.safetensors", content)

    def test_what_is_of_another_kind_is_told_by_its_content(self, tmp_path: Path) -> None:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("pickle"))
        array = io.BytesIO()
        np.save(array, np.array([{}], dtype=object))
        for content, kind in {
            archive.getvalue(): "a tar archive",
            array.getvalue(): "an array that may hold a pickle",
            b"\x89HDF\r\n\x1a\n" + bytes(9): "a Keras file",
            header(): "a GGUF file",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "a pointer of Git LFS",
        }.items():
            assert kind in refusal(read_safetensors, tmp_path / "model.safetensors", content)


class TestGguf:
    def test_names_and_shapes(self, gguf_file: Path) -> None:
        shapes = read_gguf(gguf_file, "tiny.gguf")
        assert shapes["token_embd.weight"] == (256, 32)
        assert shapes["output_norm.weight"] == (32,)
        assert sum(map(math.prod, shapes.values())) == 256 * 32 * 2 + 32 * 3 + 4 * 32 * 32 + 3 * 32 * 32

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"", "it is empty"),
            (b"NOPE" * 9, "does not begin as a GGUF file does"),
            (b"GGUF" + bytes(64), "version 0"),
            (header(version=2**24), "version 16777216"),
            (header()[:-1], "ends in the middle of its header"),
            (header(tensors=2**63), f"claims {2**63:,} tensors; at most {MOST_TENSORS:,}"),
            (header(pairs=2**63), f"claims {2**63:,} settings; at most {MOST_VALUES:,}"),
            (header(pairs=1) + struct.pack("<Q", 2**63), "ends in the middle of its header"),
            (header(pairs=1) + setting(b"a", STRING, struct.pack("<Q", 2**40)), "ends in the middle"),
            (header(pairs=1) + setting(b"a", 77, b""), "the unknown type 77"),
            (header(pairs=1) + setting(b"a", ARRAY, struct.pack("<IQ", UINT8, 2**62)), f"claims {2**62:,} values"),
            (header(pairs=1) + setting(b"a", ARRAY, struct.pack("<IQ", STRING, 2**20)), "ends in the middle"),
            (header(pairs=1) + setting(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1)) + bytes(99), "the unknown type 9"),
            (header(pairs=1) + setting(b"general.alignment", UINT32, bytes(4)), "aligned to 0 bytes"),
            (header(tensors=1) + tensor(b"t", (2,) * 9), "has 9 dimensions"),
            (header(tensors=1) + tensor(b"t", (2**62, 2**62)), "ends before its tensor t does"),
            (header(tensors=1) + tensor(b"t", (4,), offset=2**60) + bytes(99), "ends before its tensor t does"),
            (header(tensors=1) + tensor(b"t", (0,)), "which its type cannot have"),
            (header(tensors=1) + tensor(b"t", (33,), kind=8) + bytes(99), "which its type cannot have"),
            (header(tensors=1) + tensor(b"t", (4,), kind=999) + bytes(99), "999 is not a valid"),
            (header(tensors=1) + tensor(b"\xff", (4,)) + bytes(99), "decode"),
        ],
    )
    def test_what_is_damaged(self, tmp_path: Path, content: bytes, says: str) -> None:
        assert says in refusal(read_gguf, tmp_path / "broken.gguf", content)

    def test_a_pickle_under_its_name(self, tmp_path: Path) -> None:
        assert "it is a pickle" in refusal(read_gguf, tmp_path / "model.gguf", b"\x80\x04N.")


def refusal(read: Callable[[Path, str], object], file: Path, content: bytes) -> str:
    file.write_bytes(content)
    with pytest.raises(UnsupportedModel) as refused:
        read(file, file.name)
    assert refused.value.field == "model"
    assert refused.value.detail.startswith(f"{file.name} cannot be loaded: ")
    return refused.value.detail


def damaged(data: st.DataObject, content: bytes, within: int) -> bytes:
    """`content`, some of whose first `within` bytes are others, or that ends too soon."""
    if data.draw(st.booleans(), "truncated"):
        return content[: data.draw(st.integers(0, len(content) - 1), "length")]
    spoilt = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4), "flips")):
        spoilt[data.draw(st.integers(0, within - 1), "place")] = data.draw(st.integers(0, 255), "byte")
    return bytes(spoilt)


FEW = settings(max_examples=25, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(FEW, max_examples=150)


class TestDamage:
    """Whatever is damaged: a refusal or a model."""

    @FEW
    @given(data=st.data())
    def test_of_safetensors(self, weights: Path, tmp_path: Path, data: st.DataObject) -> None:
        content = weights.read_bytes()
        folder = tmp_path / "model"
        shutil.copytree(weights.parent, folder, dirs_exist_ok=True)
        within = data.draw(st.sampled_from([9, 2000, len(content)]), "within")
        (folder / "model.safetensors").write_bytes(damaged(data, content, within))
        refused_or_loaded(folder)

    @FEW
    @given(data=st.data())
    def test_of_a_configuration(self, weights: Path, tmp_path: Path, data: st.DataObject) -> None:
        folder = tmp_path / "model"
        shutil.copytree(weights.parent, folder, dirs_exist_ok=True)
        content = (weights.parent / "config.json").read_bytes()
        (folder / "config.json").write_bytes(damaged(data, content, len(content)))
        refused_or_loaded(folder)

    @FEW
    @given(data=st.data())
    def test_of_gguf(self, gguf_file: Path, tmp_path: Path, data: st.DataObject) -> None:
        content = gguf_file.read_bytes()
        within = data.draw(st.sampled_from([24, 700, len(content)]), "within")
        (tmp_path / "tiny.gguf").write_bytes(damaged(data, content, within))
        refused_or_loaded(tmp_path / "tiny.gguf")

    @MANY
    @given(data=st.data())
    def test_of_a_gguf_header(self, gguf_file: Path, tmp_path: Path, data: st.DataObject) -> None:
        content = gguf_file.read_bytes()
        (tmp_path / "tiny.gguf").write_bytes(damaged(data, content, 6000))
        with contextlib.suppress(UnsupportedModel):
            read_gguf(tmp_path / "tiny.gguf", "tiny.gguf")


def refused_or_loaded(source: Path) -> None:
    with contextlib.suppress(UnsupportedModel):
        assert load_model(str(source), CPU).digest
