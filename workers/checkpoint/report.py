"""What a person is told of a checkpoint that was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

REASONS = {
    "wider": "what is not quantized keeps the source's {dtype}, and 16 bits were counted",
    "uncounted": "numbers in the source's files that are none of the model's parameters",
    "shared": "weights that several modules share are stored for each",
    "shapes": "the shape beside each packed weight",
    "padding": "rows that end within a word",
    "headers": "the headers of the files",
}
"""Why the files of weights are not as large as the search counted, by the names of `Sizes.differences`."""

HALF = "float16"


def report(document: Mapping[str, Any]) -> Iterator[str]:
    """The lines of `Applied.document`."""
    files, predicted = document["files"], document["predicted_bytes"]
    shards = sum(name.endswith(".safetensors") for name in files)
    bits = f", {document['avg_bits']:.4g} bits per searched weight" if document["avg_bits"] is not None else ""
    yield f"Wrote {document['path']}"
    yield f"  weights    {size(document['weight_bytes'])} in {shards} file{'s' * (shards > 1)}{bits}"
    if predicted is not None:
        yield f"  predicted  {size(predicted)}" + ("; the difference:" if document["differences"] else "")
        for name, value in document["differences"].items():
            sign = "+" if value > 0 else "−"
            yield f"    {sign} {size(abs(value))}: {REASONS[name].format(dtype=document['dtype'])}"
    yield f"  all files  {size(document['bytes'])}"
    if document["loss"] is not None:
        yield f"  loss       {document['loss']:.6g} measured by the search"
    if document["check"] is not None:
        checked = document["check"]
        yield f"  checked    {checked['reloaded']:.6g} of the checkpoint when loaded again"
        yield f"             {checked['again']:.6g} of what was measured, measured again here"
    yield f"Serve it:    {document['command']}"
    if document["dtype"] != HALF:
        yield f"Its scales are {HALF}. --dtype {HALF} keeps them; in bfloat16 vLLM rounds each to 8 significant bits."


def size(nbytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes:.0f} B"
