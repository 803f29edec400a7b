"""What llama.cpp calls the layers of Hugging Face models, and the type in which it stores a weight of so many bits.

The names are checked in the tests against the maps of the `gguf` package, which llama.cpp's converter uses.
"""

from __future__ import annotations

import re

from search.inventory import Layer
from search.scheme import FULL_PRECISION, Scheme

ARCHITECTURES = {
    "BertModel": "bert",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "GemmaForCausalLM": "gemma",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2Model": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3Model": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
}
"""Model class → what llama.cpp calls its architecture. Of these, every layer's name is known."""

_WHOLE = {
    "model.embed_tokens": "token_embd",
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "embeddings.word_embeddings": "token_embd",
}
_IN_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
}
_BLOCK = re.compile(r"(?:model\.layers|layers|encoder\.layer)\.([0-9]+)\.(.+)")

SUPERBLOCK, BLOCK = 256, 32
"""Weights of a row that the K types and the others store together; a row is whole blocks."""
_K_TYPES = {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k"}
_BLOCK_TYPES = {(4, True): "q4_0", (4, False): "q4_1", (5, True): "q5_0", (5, False): "q5_1"}


def tensor_name(layer: str) -> str | None:
    """`model.layers.0.mlp.down_proj` → `blk.0.ffn_down.weight`; None for what llama.cpp does not quantize."""
    block = _BLOCK.fullmatch(layer)
    name = _WHOLE.get(layer) if block is None else _IN_BLOCK.get(block[2])
    if name is None:
        return None
    return f"{name}.weight" if block is None else f"blk.{block[1]}.{name}.weight"


def tensor_type(scheme: Scheme, columns: int) -> str | None:
    """The type with the scheme's weight bits that rows of `columns` weights can take; None when there is none.

    Groups of 32 are stored as such; others in K types where rows allow, else in groups of 32.
    """
    if scheme == FULL_PRECISION:
        return "f16"
    if scheme.weight_bits == 8:
        return None if columns % BLOCK else "q8_0"
    if columns % SUPERBLOCK == 0 and scheme.weight_bits in _K_TYPES:
        in_blocks = scheme.group_size == BLOCK and (scheme.weight_bits, scheme.symmetric) in _BLOCK_TYPES
        if not in_blocks:
            return _K_TYPES[scheme.weight_bits]
    return None if columns % BLOCK else _BLOCK_TYPES.get((scheme.weight_bits, scheme.symmetric))


def refuses(layer: Layer) -> str | None:
    """Why llama.cpp would not quantize `layer`."""
    if layer.kind in ("conv", "experts"):
        return f"the names of {'convolutions' if layer.kind == 'conv' else 'fused experts'} in GGUF are not known"
    if tensor_name(layer.name) is None:
        return "llama.cpp keeps it at full precision, or its name in GGUF is not known"
    return None


def refuses_scheme(scheme: Scheme) -> str | None:
    """Why llama.cpp has no such scheme."""
    if scheme.quantizes_activations:
        return "llama.cpp chooses itself how activations are multiplied; a GGUF file says nothing of them"
    if tensor_type(scheme, SUPERBLOCK) is None:
        return f"llama.cpp has no type of {scheme.weight_bits} bits"
    return None


def refuses_at(layer: Layer, scheme: Scheme) -> str | None:
    """Why llama.cpp would silently store `layer` in a type of other bits."""
    if tensor_type(scheme, layer.columns) is None:
        whole = BLOCK if scheme.weight_bits in (4, 5, 8) else SUPERBLOCK
        return (
            f"llama.cpp stores {scheme.weight_bits} bits in blocks of {whole}, which do not divide its "
            f"{layer.columns} columns"
        )
    return None
