import os
import shlex
import shutil
import subprocess

import pytest

gguf = pytest.importorskip("gguf")

from search import gguf_tensors  # noqa: E402
from search.exports import EXPORTS, render  # noqa: E402
from search.exports.refusing import all_schemes  # noqa: E402
from tests.peers import tiny  # noqa: E402
from tests.search.exports.examples import dealt, exported  # noqa: E402

QUANTIZE = os.environ.get("LLAMA_QUANTIZE") or shutil.which("llama-quantize")
SCHEMES = (
    *("w2a16g64", "w3a16", "w4a16g32", "w4a16g32asym", "w4a16g64", "w5a16g32asym", "w5a16g32", "w5a16"),
    *("w6a16g64", "w8a16", "w16a16"),
)
SIZES = {"hidden_size": 256, "intermediate_size": 512}


def write_gguf(model, path):
    """The model at 16 bits, by the name map that llama.cpp's converter uses; nothing but the weights is needed."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(model.config.hidden_size)
    writer.add_feed_forward_length(model.config.intermediate_size)
    writer.add_head_count(model.config.num_attention_heads)
    writer.add_head_count_kv(model.config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(model.config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        tensor = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(tensor, values.astype("float16") if values.ndim == 2 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(not QUANTIZE, reason="no llama-quantize on the path or in LLAMA_QUANTIZE")
def test_every_tensor_has_the_type_asked_for(tmp_path, found):
    """The real llama-quantize reads our `--tensor-type-file` beside a 16-bit GGUF of a Llama of 12 blocks; in the file
    that it writes, every tensor has the type asked for."""
    model = tiny.llama(**SIZES)
    inventory = tiny.inventory_of(model)
    point = exported(inventory, dealt(inventory, SCHEMES, "llama.cpp"), "llama.cpp")
    export = EXPORTS["llama.cpp"]
    (tmp_path / export.filename).write_text(render("llama.cpp", point))
    write_gguf(model, tmp_path / "a-model-f16.gguf")
    _, command = export.command(search=1, point=3, model="a-model", source="a-model").split(" && ")
    tool, *arguments = shlex.split(command)
    assert tool == "llama-quantize"
    subprocess.run([QUANTIZE, *arguments], cwd=tmp_path, check=True, timeout=600)
    types = {one.name: one.tensor_type.name.lower() for one in gguf.GGUFReader(tmp_path / "a-model.gguf").tensors}
    schemes = all_schemes(point)
    asked = {
        gguf_tensors.tensor_name(layer.name): gguf_tensors.tensor_type(schemes[layer.name], layer.columns)
        for layer in inventory.layers
    }
    assert {name: types[name] for name in asked} == asked
    assert {kind for name, kind in types.items() if name not in asked} == {"f32"}
    found(tensors=len(asked), types=" ".join(sorted(set(asked.values()))))


@pytest.mark.skipif(not QUANTIZE, reason="no llama-quantize on the path or in LLAMA_QUANTIZE")
def test_for_a_file_of_sixteen_bits_the_rules_are_ignored(tmp_path):
    """llama-quantize heeds the rules only where the type of the whole file is a quantized one: the trap that the
    command avoids."""
    model = tiny.llama(blocks=1, **SIZES)
    write_gguf(model, tmp_path / "f16.gguf")
    (tmp_path / "types.txt").write_text("^blk\\.0\\.ffn_down\\.weight$=q8_0\n")
    for kind in ("F16", "Q8_0"):
        arguments = ["--pure", "--tensor-type-file", "types.txt", "f16.gguf", f"{kind}.gguf", kind]
        subprocess.run([QUANTIZE, *arguments], cwd=tmp_path, check=True, timeout=600)
        types = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / f"{kind}.gguf").tensors}
        assert types["blk.0.ffn_down.weight"] == kind
