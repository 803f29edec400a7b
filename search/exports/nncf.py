"""NNCF: a Python file that compresses the weights of an OpenVINO model, one pass of `compress_weights` a scheme.

Checked against NNCF 3.4 and OpenVINO 2026.4. One pass knows one scheme and the layers to leave alone; what an earlier
pass has compressed, a later one passes over. So each pass ignores all layers but its own, and no pass falls back to
another width.
"""

from __future__ import annotations

import json

from search.exports import Exported, export
from search.exports.refusing import all_schemes, check_quantized, check_schemes
from search.inventory import Layer
from search.scheme import FULL_PRECISION, Scheme

ASYMMETRIC_BITS = (4, 8)


@export(
    "nncf",
    filename="compress_with_nncf.py",
    description="A Python file that compresses an OpenVINO model with NNCF's `compress_weights`",
    carries="Linear layers and embeddings with 16-bit activations: 8-bit weights per channel, 4-bit weights, and "
    "symmetric 2-bit weights of linear layers.",
    use="python {file} {source}/openvino_model.xml {model}-nncf/openvino_model.xml",
    media_type="text/x-python",
)
def write_nncf(exported: Exported) -> str:
    """The candidate as a program and a module: `PASSES`, and `compress(model)`, which makes them.

    Raises ExportRefused for schemes that no mode of `compress_weights` stands for.
    """
    check_schemes(exported, _problem)
    check_quantized(exported, "NNCF")
    schemes = all_schemes(exported)
    passes: dict[Scheme, list[str]] = {}
    for layer in exported.inventory.layers:
        if schemes[layer.name] != FULL_PRECISION:
            passes.setdefault(schemes[layer.name], []).extend((layer.name, *layer.aliases))
    return _CODE.replace("PASSES_GO_HERE", "".join(_written(scheme, passes[scheme]) for scheme in sorted(passes)))


_CODE = '''\
"""Compress an OpenVINO model with NNCF (3.4 or later) as a point of a Bitfrontier search says: IN.xml OUT.xml."""

import re
import sys
from pathlib import Path

import nncf

# mode, group size (-1: one scale per output channel), layers
PASSES = [
PASSES_GO_HERE]


def named(layers):
    """A pattern for the nodes of these layers and for their weights."""
    names = "|".join(re.escape(layer).replace(r"\\.", "[./]") for layer in layers)
    return f"((__module|self)[./])?({names})[./]"


def compress(model, **more):
    for mode, group_size, layers in PASSES:
        # The modes of 8 bits take no such arguments: they know one scale per output channel and no other width.
        grouped = {"group_size": group_size, "ratio": 1.0, "all_layers": True, "backup_mode": nncf.BackupMode.NONE}
        model = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode(mode),
            ignored_scope=nncf.IgnoredScope(patterns=[f"(?!{named(layers)}).*"]),
            **({} if mode.startswith("int8") else grouped),
            **more,
        )
    return model


def main(source, output):
    import openvino

    model = openvino.Core().read_model(source)
    nodes = [node.get_friendly_name() for node in model.get_ops()]
    for layer in (layer for _, _, layers in PASSES for layer in layers):
        if not any(re.match(named([layer]), node) for node in nodes):
            sys.exit(f"{source} has no layer called {layer}")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(compress(model), output, compress_to_fp16=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
'''


def _problem(layer: Layer, scheme: Scheme) -> str | None:
    bits = scheme.weight_bits
    if layer.kind in ("conv", "experts"):
        return "only the names of linear layers and embeddings are those of OpenVINO's nodes"
    if scheme.quantizes_activations:
        return "compress_weights leaves activations alone"
    if bits == 3:
        return "NNCF cannot read a model that has 3-bit weights already, as its next pass must"
    if bits not in (2, 4, 8):
        return f"NNCF has no mode of {bits} bits"
    if not scheme.symmetric and bits not in ASYMMETRIC_BITS:
        return f"NNCF's {bits}-bit weights are symmetric"
    if bits == 8 and scheme.group_size is not None:
        return "NNCF has 8-bit weights per channel only"
    if layer.kind == "embedding" and bits < 4:
        return "OpenVINO looks up embeddings of 4 or 8 bits"
    if not scheme.fits(layer.columns):
        return f"the group size does not divide its {layer.columns} columns"
    return None


def _written(scheme: Scheme, layers: list[str]) -> str:
    mode = f"int{scheme.weight_bits}_{'sym' if scheme.symmetric else 'asym'}"
    names = "".join(f"        {json.dumps(name)},\n" for name in layers)
    return f'    ("{mode}", {scheme.group_size or -1}, [\n{names}    ]),\n'
