"""llama.cpp: the `--tensor-type-file` of llama-quantize.

Checked against the sources of llama.cpp of October 2026: names are lower-cased and searched for anywhere in a tensor's
name, which rule wins differs by version, and rules count only where the type of the whole file is a quantized one. So
every tensor has one anchored pattern, and the command asks for Q8_0.
"""

from __future__ import annotations

import re

from search import gguf_tensors
from search.errors import ExportRefused
from search.exports import Exported, export
from search.exports.refusing import all_schemes, check_quantized, check_schemes
from search.inventory import Layer
from search.scheme import Scheme


@export(
    "llama.cpp",
    filename="tensor_types.txt",
    description="The `--tensor-type-file` of llama-quantize: a GGUF type for every tensor",
    carries="Widths of 2, 3, 4, 5, 6 and 8 bits with 16-bit activations. How weights are grouped and rounded within a "
    "type is llama.cpp's own, and so is what scales take: 2.6, 3.4, 4.5 to 5, 5.5 to 6, 6.6 and 8.5 bits a weight in "
    "all. The measured loss is that of the widths, not of the types.",
    use="python convert_hf_to_gguf.py {source} --outtype f16 --outfile {model}-f16.gguf && "
    "llama-quantize --pure --tensor-type-file {file} {model}-f16.gguf {model}.gguf Q8_0",
    media_type="text/plain",
)
def write_llama_cpp(exported: Exported) -> str:
    """The candidate as one `pattern=type` a line, for every quantizable layer, also those that keep 16 bits.

    Raises ExportRefused where llama.cpp would choose another type, or the names are not known.
    """
    inventory, schemes = exported.inventory, all_schemes(exported)
    if inventory.architecture not in gguf_tensors.ARCHITECTURES:
        raise ExportRefused(
            f"what llama.cpp calls the layers of {inventory.architecture} is not known",
            value=inventory.architecture,
            accepted=sorted(gguf_tensors.ARCHITECTURES),
        )
    check_schemes(exported, _problem)
    check_quantized(exported, "llama.cpp")
    lines = []
    for layer in inventory.layers:
        name = gguf_tensors.tensor_name(layer.name)
        if name is not None:
            lines.append(f"^{re.escape(name)}$={gguf_tensors.tensor_type(schemes[layer.name], layer.columns)}\n")
    return "".join(lines)


def _problem(layer: Layer, scheme: Scheme) -> str | None:
    return gguf_tensors.refuses(layer) or gguf_tensors.refuses_scheme(scheme) or gguf_tensors.refuses_at(layer, scheme)
