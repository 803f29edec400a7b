import json
import os

import pytest

from search.exports import render
from search.exports.refusing import all_schemes
from search.scheme import FULL_PRECISION
from tests.peers import tiny
from tests.peers.checkpoints import quantization_config, shapes
from tests.search.exports.examples import dealt, exported

# Its pool of threads wants two even where OMP_NUM_THREADS is one.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
pytest.importorskip("gptqmodel", reason="make test-exports runs this in an environment of its own")

from gptqmodel import GPTQModel, QuantizeConfig

SCHEMES = ("w4a16g64", "w6a16g32asym", "w8a16", "w3a16g32", "w16a16", "w2a16g16", "w5a16", "w7a16g32")


def config_of(point):
    """Our file as GPTQModel reads it."""
    return QuantizeConfig.from_quant_config(json.loads(render("gptqmodel", point)))


def scheme_in(config, name):
    """What GPTQModel's processors ask of the configuration before they quantize a layer; None where they skip it."""
    if config.dynamic_get(name) is False:
        return None
    return tuple(config.dynamic_get(name, key, getattr(config, key)) for key in ("bits", "group_size", "sym"))


def asked(scheme):
    return None if scheme == FULL_PRECISION else (scheme.weight_bits, scheme.group_size or -1, scheme.symmetric)


@pytest.mark.parametrize("schemes", [SCHEMES, ("w4a16g64", "w8a16", "w3a16g32", "w2a16g16asym", "w16a16")])
def test_the_configuration_gives_every_layer_its_scheme(schemes, found):
    """`QuantizeConfig.from_quant_config` reads our file; `dynamic_get`, as the quantizer calls it, gives every layer of
    a 12-block Llama the bits, group size and symmetry asked for; the format is GPTQ_P just where a width needs it."""
    inventory = tiny.inventory_of(tiny.llama())
    point = exported(inventory, dealt(inventory, schemes, "generic") | {"model.embed_tokens": "w16a16"}, "generic")
    config = config_of(point)
    wanted = all_schemes(point)
    for layer in inventory.layers:
        if layer.kind == "linear":
            assert scheme_in(config, layer.name) == asked(wanted[layer.name]), layer.name
    planar = any(scheme.weight_bits in (5, 6, 7) for scheme in wanted.values())
    assert config.format == ("gptq_p" if planar else "gptq")
    assert config.lm_head == (wanted["lm_head"] != FULL_PRECISION)
    found(rules=len(config.dynamic), format=config.format.value)


def test_experts_are_found_under_the_names_gptqmodel_gives_them():
    """Every expert of a Mixtral's layer, by the name it has once GPTQModel has taken the fused experts apart, has the
    scheme of the layer's experts."""
    inventory = tiny.inventory_of(tiny.mixtral())
    point = exported(inventory, dealt(inventory, ("w4a16g32", "w16a16", "w8a16g32")))
    config, wanted = config_of(point), all_schemes(point)
    for number in range(4):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            fused = "down_proj" if projection == "down_proj" else "gate_up_proj"
            name = f"model.layers.0.mlp.experts.{number}.{projection}"
            assert scheme_in(config, name) == asked(wanted[f"model.layers.0.mlp.experts.{fused}"]), name


def test_it_quantizes_as_asked(llama_folder, tmp_path, found):
    """`GPTQModel.load(…, ours).quantize(…)` on a Llama of 3 blocks saves every layer with the bits and groups asked
    for, and what keeps full precision as it was."""
    inventory = tiny.inventory_of(tiny.llama(blocks=3))
    point = exported(inventory, dealt(inventory, ("w4a16g32", "w8a16", "w3a16g64", "w2a16g16asym", "w16a16")))
    config = config_of(point)
    # Else it compiles an extension for some minutes.
    config.pack_impl = "original"
    config.offload_to_disk = False
    model = GPTQModel.load(str(llama_folder), config, device="cpu")
    model.quantize([f"the quick brown fox jumps over {number} lazy dogs" * 4 for number in range(16)], batch_size=1)
    model.save(str(tmp_path / "quantized"))

    written = shapes(tmp_path / "quantized")
    for layer in inventory.layers:
        scheme = all_schemes(point)[layer.name]
        if scheme == FULL_PRECISION:
            assert f"{layer.name}.weight" in written
            assert f"{layer.name}.qweight" not in written
        else:
            groups = layer.columns // (scheme.group_size or layer.columns)
            assert written[f"{layer.name}.qweight"][1] == (layer.columns * scheme.weight_bits // 32, layer.rows)
            assert written[f"{layer.name}.scales"][1] == (groups, layer.rows)
    assert quantization_config(tmp_path / "quantized")["dynamic"] == config.dynamic
    found(layers=sum(name.endswith("qweight") for name in written))
