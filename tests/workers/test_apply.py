"""A checkpoint holds exactly the weights that were measured, as compressed-tensors and transformers read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from search.errors import Conflict, ExportRefused, InvalidRequest, UnsupportedModel
from search.exports import render
from search.exports.native import read_native
from tests.workers.applying import decompressed, loss, measured_point
from tests.workers.conftest import ModelFolder
from tests.workers.gguf_file import write_gguf
from workers.apply import Applied, Asked, apply
from workers.checkpoint import plan
from workers.checkpoint.check import check
from workers.checkpoint.compressed import DamagedCheckpoint
from workers.checkpoint.folder import CannotWrite
from workers.checkpoint.plan import entries
from workers.checkpoint.report import report
from workers.checkpoint.source import headers
from workers.evaluator import Evaluator
from workers.settings import Dtype
from workers.sources import find_model, register

WEIGHT_ONLY = ["w2a16g64", "w3a16g32", "w4a16", "w5a16g16", "w6a16g64", "w7a16g64", "w8a16"]
EVERY = [*WEIGHT_ONLY, "w2a16g16asym", "w4a16g32asym", "w6a16asym", "w8a8", "w5a8"]


def same_as(asked: Asked) -> object:
    """The measured loss. The order of a sum may depend on where the numbers lie in memory."""
    return pytest.approx(asked.exported.candidate.metrics["loss"], rel=1e-6)


def config_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found


def assert_holds(folder: Path, asked: Asked, evaluator: Evaluator) -> None:
    """The checkpoint's quantized weights are what the evaluator measured."""
    read = decompressed(folder)
    schemes = asked.exported.schemes
    assert read.keys() == schemes.keys()
    for name, weight in read.items():
        assert torch.equal(weight.to(evaluator.loaded.model.dtype), evaluator.weight(name, schemes[name])), name  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantizer", ["rtn", "mse"])
def test_compressed_tensors_reads_what_was_measured_at_every_width(
    model_folder: ModelFolder, tmp_path: Path, dtype: Dtype, quantizer: str
) -> None:
    source = model_folder("tiny_llama")
    for turn, schemes in enumerate((EVERY[:7], EVERY[5:])):
        asked, evaluator = measured_point(source, schemes, quantizer, dtype)
        apply(asked, tmp_path / str(turn))
        assert_holds(tmp_path / str(turn), asked, evaluator)
        # All else is the source's, bit for bit.
        written, kept = load_file(tmp_path / str(turn) / "model.safetensors"), load_file(source / "model.safetensors")
        others = [name for name in kept if name.removesuffix(".weight") not in asked.exported.schemes]
        assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(others)
        assert all(torch.equal(written[name], kept[name]) for name in others)


def test_transformers_loads_it_and_its_loss_is_the_measured_one(model_folder: ModelFolder, tmp_path: Path) -> None:
    asked, evaluator = measured_point(model_folder("tiny_llama"), WEIGHT_ONLY)
    apply(asked, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert loss(evaluator, model) == same_as(asked)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("text")["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_a_real_encoder_loses_what_was_measured(model_folder: ModelFolder, tmp_path: Path) -> None:
    asked, evaluator = measured_point(model_folder("minilm"), ["w4a16g64", "w6a16g64", "w8a16g64", "w3a16g32"], "rtn")
    apply(asked, tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32, add_pooling_layer=False)
    assert loss(evaluator, model) == same_as(asked)
    # Who serves it finds how it pools.
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    assert (tmp_path / "out" / "modules.json").is_file()


def test_eight_bit_weights_and_activations_are_stored_as_integers(model_folder: ModelFolder, tmp_path: Path) -> None:
    asked, evaluator = measured_point(model_folder("tiny_llama"), ["w8a8"])
    apply(asked, tmp_path / "out")
    assert config_of(tmp_path / "out")["quantization_config"]["format"] == "int-quantized"  # type: ignore[index]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert_holds(tmp_path / "out", asked, evaluator)
    # compressed-tensors rounds activations to max/127.5, vLLM and we to max/127.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert loss(evaluator, model) == pytest.approx(asked.exported.candidate.metrics["loss"], rel=0.5)


def test_experts_are_stored_one_by_one_under_the_names_of_the_source(model_folder: ModelFolder, tmp_path: Path) -> None:
    asked, evaluator = measured_point(model_folder("tiny_moe"), ["w4a16g32", "w6a16g64"])
    applied = apply(asked, tmp_path / "out", verify=True)
    assert applied.check is not None
    assert applied.check.again == same_as(asked)
    assert applied.check.reloaded == same_as(asked)
    read = decompressed(tmp_path / "out")
    down = "model.layers.0.mlp.experts.down_proj"
    one_by_one = [read[f"model.layers.0.block_sparse_moe.experts.{number}.w2"] for number in range(4)]
    assert torch.equal(torch.stack(one_by_one), evaluator.weight(down, asked.exported.schemes[down]))


def test_a_gguf_file_becomes_safetensors(model_folder: ModelFolder, tmp_path: Path) -> None:
    write_gguf(LlamaForCausalLM.from_pretrained(model_folder("tiny_llama")), tmp_path / "tiny.gguf")
    asked, evaluator = measured_point(tmp_path / "tiny.gguf", WEIGHT_ONLY)
    applied = apply(asked, tmp_path / "out", verify=True)
    assert_holds(tmp_path / "out", asked, evaluator)
    assert applied.check is not None
    assert applied.check.reloaded == same_as(asked)
    assert config_of(tmp_path / "out")["architectures"] == ["LlamaForCausalLM"]
    assert not list((tmp_path / "out").glob(".unpacked*"))


def test_a_backbone_is_found_under_the_name_of_the_model_it_was_part_of(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    source = shutil.copytree(model_folder("tiny_bert"), tmp_path / "bert")
    weights = load_file(source / "model.safetensors")
    save_file({f"bert.{name}": one for name, one in weights.items()}, source / "model.safetensors", {"format": "pt"})
    asked, _ = measured_point(source, ["w4a16g64", "w8a8"])
    applied = apply(asked, tmp_path / "out", verify=True)
    assert applied.check is not None
    assert applied.check.reloaded == same_as(asked)
    assert "bert.encoder.layer.0.attention.self.key.weight_packed" in load_file(tmp_path / "out" / "model.safetensors")


def test_large_checkpoints_have_several_files_and_an_index(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "SHARD_BYTES", 50_000)
    asked, evaluator = measured_point(model_folder("tiny_llama"), WEIGHT_ONLY)
    applied = apply(asked, tmp_path / "out")
    shards = sorted(name for name in applied.files if name.endswith(".safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / shard)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert loss(evaluator, model) == same_as(asked)


@pytest.fixture
def applied(model_folder: ModelFolder, tmp_path: Path) -> Applied:
    """A checked checkpoint of the tiny Llama in `out`."""
    asked, _ = measured_point(model_folder("tiny_llama"), ["w4a16g32asym", "w8a8", "w6a16"])
    return apply(asked, tmp_path / "out", verify=True)


def test_it_says_what_it_wrote_to_the_byte(applied: Applied, tmp_path: Path) -> None:
    document = applied.document()
    sizes = {str(file.relative_to(tmp_path / "out")): file.stat().st_size for file in (tmp_path / "out").rglob("*")}
    assert document["files"] == sizes
    assert document["bytes"] == sum(sizes.values())
    assert document["weight_bytes"] == sizes["model.safetensors"]
    assert document["weight_bytes"] == document["predicted_bytes"] + sum(document["differences"].values())
    assert {"wider", "shapes", "headers"} <= document["differences"].keys()
    assert document["layers"] == {"w4a16g32asym": 6, "w6a16": 3, "w8a8": 5}
    assert document["loss"] == document["check"]["measured"] == pytest.approx(document["check"]["reloaded"], rel=1e-6)
    told = "\n".join(report(document))
    assert f"vllm serve {tmp_path / 'out'}" in told
    assert f"{document['loss']:.6g} measured by the search" in told
    assert json.loads(json.dumps(document)) == document
    assert replace(applied, folder=Path("/my models")).document()["command"] == "vllm serve '/my models'"


def test_whoever_reads_its_configuration_reads_its_weights(applied: Applied, tmp_path: Path) -> None:
    modes = {file.name: file.stat().st_mode for file in applied.folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_it_carries_the_document_it_was_made_from(applied: Applied, tmp_path: Path) -> None:
    document = read_native((tmp_path / "out" / "bitfrontier.json").read_text())
    assert document.schemes == applied.asked.exported.schemes
    assert document.point.number == 3


def test_the_check_finds_a_weight_that_is_not_the_measured_one(applied: Applied, tmp_path: Path) -> None:
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight_packed"][0, 0] ^= 1 << 3
    save_file(tensors, file, {"format": "pt"})
    found = applied.asked.exported
    wanted = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    planned = entries(found, wanted, headers(find_model(applied.asked.source)))
    assert applied.asked.measured_with is not None
    with pytest.raises(DamagedCheckpoint, match=r"q_proj.weight of the checkpoint is not the weight"):
        check(tmp_path / "out", planned, applied.asked.measured_with[0], found.schemes, applied.asked.measured_with[1])


def test_it_is_not_checked_with_other_data(applied: Applied, tmp_path: Path) -> None:
    assert applied.asked.measured_with is not None
    other = Asked(applied.asked.exported, applied.asked.source, None, (applied.asked.measured_with[0], "other"))
    with pytest.raises(Conflict, match="calibration data"):
        apply(other, tmp_path / "new", verify=True)
    unknown = Asked(applied.asked.exported, applied.asked.source)
    with pytest.raises(InvalidRequest, match="which data"):
        apply(unknown, tmp_path / "new", verify=True)
    assert not (tmp_path / "new").exists()


def test_only_a_checkpoint_of_ours_is_overwritten(applied: Applied, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="not empty"):
        apply(applied.asked, tmp_path / "out")
    stale = tmp_path / "out" / "model-00001-of-00002.safetensors"
    stale.touch()
    apply(applied.asked, tmp_path / "out", overwrite=True)
    assert not stale.exists()
    letter = tmp_path / "out" / "letter"
    letter.touch()
    with pytest.raises(InvalidRequest, match="something else"):
        apply(applied.asked, tmp_path / "out", overwrite=True)
    assert letter.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_model_that_its_document_lies_beside_is_no_checkpoint(model_folder: ModelFolder, tmp_path: Path) -> None:
    source = shutil.copytree(model_folder("tiny_llama"), tmp_path / "model")
    asked, _ = measured_point(source, ["w4a16g64"])
    (source / "bitfrontier.json").write_text(render("json", asked.exported))
    before = contents(source)
    with pytest.raises(InvalidRequest, match="something else"):
        apply(asked, source, overwrite=True)
    assert contents(source) == before


def test_a_checkpoint_that_holds_the_model_itself_is_not_overwritten(
    applied: Applied, model_folder: ModelFolder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copyfile(model_folder("tiny_llama") / "model.safetensors", out / "model.safetensors")
    before = contents(out)
    with pytest.raises(InvalidRequest, match="holds the files of 'a-model' itself"):
        apply(replace(applied.asked, source=str(out)), out, overwrite=True)
    assert contents(out) == before


def test_what_vllm_could_not_load_is_refused_before_anything_is_written(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    asked, _ = measured_point(model_folder("tiny_llama"), ["w4a16g64"])
    asked.exported.candidate.allocation["lm_head"] = "w4a16"
    with pytest.raises(ExportRefused, match="lm_head"):
        apply(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_files_changed_is_not_the_one_that_was_searched(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    source = shutil.copytree(model_folder("tiny_llama"), tmp_path / "model")
    asked, _ = measured_point(source, ["w4a16g64"])
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(Conflict, match="changed since it was searched"):
        apply(asked, tmp_path / "out")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["model"]


def test_a_weight_under_another_name_is_not_guessed(model_folder: ModelFolder) -> None:
    asked, _ = measured_point(model_folder("tiny_llama"), ["w4a16g64"])
    stored = headers(find_model(asked.source))
    moved = [replace(one, name=name.replace("layers.1.mlp", "layers.1.ffn")) for name, one in stored.items()]
    groups = {"all": {"targets": list(asked.exported.schemes), "format": "pack-quantized"}}
    assert sum(bool(entry.modules) for entry in entries(asked.exported, {"config_groups": groups}, stored)) == 14
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp"):
        entries(asked.exported, {"config_groups": groups}, {one.name: one for one in moved})


def test_what_a_server_needs_is_brought_along_and_not_read(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = shutil.copytree(model_folder("tiny_llama"), tmp_path / "elsewhere")
    (elsewhere / "chat_template.jinja").write_text("{{ messages }}")
    monkeypatch.setenv("BITFRONTIER_MODELS", str(tmp_path / "models"))
    source, _ = register("tiny", str(elsewhere))
    files = find_model(source)
    assert {"generation_config.json", "chat_template.jinja"} <= files.serving.keys()
    with files.opened() as folder:
        assert not {one.name for one in folder.iterdir()} & files.serving.keys()
    asked, _ = measured_point(source, ["w4a16g64"])
    apply(asked, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out" / "generation_config.json").is_file()


@pytest.mark.parametrize("fail", ["room", "write"])
def test_a_full_disk_is_told_and_nothing_stays(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: str
) -> None:
    asked, _ = measured_point(model_folder("tiny_llama"), ["w4a16g64"])

    def refuse(*_: object) -> Callable[..., None]:
        raise OSError(28, "No space left on device")

    if fail == "room":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    else:
        monkeypatch.setattr("safetensors.torch.save_file", refuse)
    with pytest.raises(CannotWrite, match=r"short|disk is full"):
        apply(asked, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
