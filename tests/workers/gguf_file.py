"""Write a Llama as a GGUF file, the way llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize, quantize
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaForCausalLM

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def write_gguf(model: LlamaForCausalLM, file: Path) -> dict[str, np.ndarray]:
    """Matrices in Q8_0, vectors in F32, the vocabulary being bytes; returns the weights that the file holds."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(ByteLevel.alphabet())[:-1], "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    held = {}
    for name, parameter in model.state_dict().items():
        weight = parameter.numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        stored = quantize(_interleaved(weight, heads) if heads else weight, kind)
        writer.add_tensor(_gguf_name(name), stored, raw_dtype=kind)
        # Rows are quantized each by itself, so their order does not matter.
        held[name] = dequantize(quantize(weight, kind), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp pairs neighbouring rows for rotary embedding, transformers the halves of a head."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _gguf_name(name: str) -> str:
    module = name.removesuffix(".weight").removeprefix("model.")
    if not module.startswith("layers."):
        return f"{NAMES[module]}.weight"
    _, block, inner = module.split(".", 2)
    return f"blk.{block}.{NAMES[inner]}.weight"
