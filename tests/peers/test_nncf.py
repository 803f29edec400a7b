import shlex
import subprocess
import sys

import pytest

pytest.importorskip("nncf")
import openvino
import torch

from search.exports import EXPORTS, render
from search.exports.refusing import all_schemes
from search.scheme import FULL_PRECISION, Scheme
from tests.peers import tiny
from tests.search.exports.examples import dealt, exported

SCHEMES = ("w4a16g64", "w8a16", "w16a16", "w4a16g16asym", "w8a16asym", "w4a16", "w2a16g32", "w2a16", "w4a16asym")
BITS = {"u2": 2, "i2": 2, "u4": 4, "i4": 4, "u8": 8, "i8": 8}
INPUTS = {
    "input_ids": torch.arange(12)[None],
    "attention_mask": torch.ones(1, 12, dtype=torch.long),
    "position_ids": torch.arange(12)[None],
}


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


@pytest.fixture(scope="module")
def point(model):
    inventory = tiny.inventory_of(model)
    allocation = dealt(inventory, SCHEMES) | {"model.embed_tokens": "w4a16g32asym", "lm_head": "w8a16"}
    return exported(inventory, allocation)


@pytest.fixture(scope="module")
def compressed(model, point, tmp_path_factory):
    """What the command that is shown leaves, typed into a shell beside the converted model."""
    folder = tmp_path_factory.mktemp("nncf")
    model.config.use_cache = False
    converted = openvino.convert_model(model, example_input=dict(INPUTS))
    (folder / "a-model").mkdir()
    openvino.save_model(converted, folder / "a-model" / "openvino_model.xml", compress_to_fp16=False)
    export = EXPORTS["nncf"]
    (folder / export.filename).write_text(render("nncf", point))
    command = shlex.split(export.command(search=1, point=3, model="a-model", source="a-model"))
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], cwd=folder, check=True, timeout=600)
    return openvino.Core().read_model(folder / "a-model-nncf" / "openvino_model.xml")


def stored(model, columns):
    """Layer → the scheme of its constant; `columns` are those of each layer."""
    constants = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
    found = {}
    for name, width in columns.items():
        weight = constants[f"self.{name}.weight"]
        kind = weight.get_element_type().get_type_name()
        if kind in BITS:
            group = list(weight.shape)[-1]
            zero = constants.get(f"self.{name}.weight/zero_point")
            # Codes of 2 bits have no sign: the zero point of all symmetric weights is the middle.
            symmetric = zero is None or (not list(zero.shape) and zero.data == 2 ** (BITS[kind] - 1))
            found[name] = Scheme(BITS[kind], 16, None if group == width else group, symmetric)
        else:
            found[name] = FULL_PRECISION
    return found


def test_every_constant_is_stored_as_asked(point, compressed, found):
    """NNCF compresses a Llama of 12 blocks in one pass for each scheme; the constants of the OpenVINO model have the
    bits, groups and zero points asked for, and those of 16 bits are untouched."""
    columns = {layer.name: layer.columns for layer in point.inventory.layers}
    asked = {
        # One group as wide as a row is a row.
        name: Scheme(one.weight_bits, 16, None, one.symmetric) if one.group_size == columns[name] else one
        for name, one in all_schemes(point).items()
    }
    assert stored(compressed, columns) == asked
    found(layers=len(asked), schemes=" ".join(SCHEMES))


def test_openvino_runs_it(model, compressed):
    """OpenVINO compiles the compressed model for a CPU and runs it."""
    runs = openvino.compile_model(compressed, "CPU")
    (logits,) = runs({name: value.numpy() for name, value in INPUTS.items()}).values()
    assert logits.shape == (1, 12, 96)
    assert torch.isfinite(torch.from_numpy(logits)).all()


def test_a_layer_that_is_not_there_is_said(point, tmp_path):
    """The program refuses a model without one of the layers, where NNCF would compress the others without a word."""
    converted = openvino.convert_model(torch.nn.Linear(4, 4), example_input=torch.zeros(1, 4))
    openvino.save_model(converted, tmp_path / "other.xml")
    (tmp_path / "compress.py").write_text(render("nncf", point))
    done = subprocess.run(
        [sys.executable, "compress.py", "other.xml", "out.xml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert "has no layer called" in done.stderr
