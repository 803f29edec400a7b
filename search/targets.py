"""Targets: the runtime that will load the result decides which layers must agree and which schemes it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from search import gguf_tensors
from search.errors import InvalidRequest
from search.inventory import Layer
from search.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Target:
    """What a runtime fuses, skips and accepts.

    `fused` lists sets of sibling names under one parent that the runtime merges into one matrix; `ties_experts` says
    whether all experts of a layer must agree, `splits_layers` whether output channels of one layer may differ.
    `refuses(layer)`, `refuses_scheme(scheme)` and, of the two together, `refuses_at(layer, scheme)` give the reason, or
    None. `default_schemes` are open to every layer where a request names none.
    """

    name: str
    description: str
    fused: tuple[tuple[str, ...], ...]
    ties_experts: bool
    refuses: Callable[[Layer], str | None]
    refuses_scheme: Callable[[Scheme], str | None]
    splits_layers: bool = False
    refuses_at: Callable[[Layer, Scheme], str | None] = lambda layer, scheme: None
    default_schemes: tuple[str, ...] = ("w4a16g64", "w5a16g64", "w6a16g64", "w8a16g64")


# The names under which model families keep what runtimes merge: Llama-like, BERT-like and DistilBERT's attention,
# DeepSeek's latent attention, gated MLPs.
FUSED_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)

# vLLM builds most of these without a quantization config, whatever the checkpoint says.
_VLLM_HEADS = {"lm_head", "embed_out", "classifier", "pre_classifier", "score", "pooler", "cls", "mlm_head"}
_VLLM_ROUTERS = {"gate", "router", "shared_expert_gate"}


def _vllm_refuses(layer: Layer) -> str | None:
    parts = layer.name.split(".")
    if layer.kind == "conv":
        return "vLLM does not quantize convolutions"
    if layer.kind == "embedding":
        return "vLLM loads a quantized embedding in some models only"
    if _VLLM_HEADS.intersection(parts):
        return "vLLM loads quantized heads and poolers in some models only"
    if parts[-1] in _VLLM_ROUTERS:
        return "vLLM keeps routers at full precision"
    if layer.transposed:
        return "compressed-tensors does not quantize transposed weights (Conv1D)"
    if len(parts) == 1:
        return "vLLM takes a name without a dot for a kind of layer"
    return None


def _vllm_refuses_scheme(scheme: Scheme) -> str | None:
    # Weight-only: 2 to 8 bits, symmetric or not, per channel or grouped, all have a kernel.
    if not scheme.quantizes_activations:
        return None
    if scheme.activation_bits != 8:
        return (
            f"vLLM has no kernel for {scheme.activation_bits}-bit activations that it would not replace by a wider one"
        )
    if scheme.group_size is not None:
        return "vLLM multiplies grouped weights with 16-bit activations, whatever the checkpoint says"
    if scheme.weight_bits == 4:
        return "vLLM multiplies 4-bit weights with 16-bit activations on most devices"
    if scheme.weight_bits == 8 and not scheme.symmetric:
        return "vLLM's INT8 kernels take symmetric weights only"
    return None


def _onnxruntime_refuses(layer: Layer) -> str | None:
    if layer.transposed:
        return "Olive does not quantize transposed weights (Conv1D)"
    if layer.kind in ("conv", "experts"):
        return "ONNX Runtime's MatMulNBits stands for linear layers"
    if layer.kind == "embedding" and layer.name != "model.embed_tokens":
        return "Olive quantizes the embedding of the input tokens only"
    return None


def _onnxruntime_refuses_scheme(scheme: Scheme) -> str | None:
    if not scheme.quantizes_weights:
        return None
    if scheme.quantizes_activations:
        return "MatMulNBits says nothing of how activations are stored"
    if scheme.weight_bits not in (2, 4, 8):
        return f"MatMulNBits has no {scheme.weight_bits}-bit weights"
    if scheme.group_size is None:
        return "MatMulNBits takes blocks of 16 to 256 weights, not whole rows"
    return None


def _onnxruntime_refuses_at(layer: Layer, scheme: Scheme) -> str | None:
    if layer.kind == "embedding" and scheme.weight_bits == 2:
        return "ONNX Runtime looks up embeddings of 4 or 8 bits"
    return None


TARGETS = {
    target.name: target
    for target in (
        Target(
            "generic",
            "No particular runtime: every layer is its own unit and every scheme is allowed",
            fused=(),
            ties_experts=False,
            refuses=lambda layer: None,
            refuses_scheme=lambda scheme: None,
            splits_layers=True,
        ),
        Target(
            "vllm",
            "vLLM through compressed-tensors: q/k/v, gate/up and the experts of a layer share a scheme",
            fused=FUSED_SIBLINGS,
            ties_experts=True,
            refuses=_vllm_refuses,
            refuses_scheme=_vllm_refuses_scheme,
        ),
        Target(
            "llama.cpp",
            "llama.cpp through a GGUF file: every tensor has a type of its own, weights of 2, 3, 4, 5, 6 or 8 bits",
            fused=(),
            ties_experts=False,
            refuses=gguf_tensors.refuses,
            refuses_scheme=gguf_tensors.refuses_scheme,
            refuses_at=gguf_tensors.refuses_at,
            # Types of 32 weights fit rows of any model; those of 3 and 6 bits want rows of whole 256.
            default_schemes=("w4a16g32", "w5a16g32", "w8a16g32"),
        ),
        Target(
            "onnxruntime",
            "ONNX Runtime through Olive: q/k/v share a scheme; grouped weights of 2, 4 or 8 bits",
            fused=FUSED_SIBLINGS[:1],
            ties_experts=False,
            refuses=_onnxruntime_refuses,
            refuses_scheme=_onnxruntime_refuses_scheme,
            refuses_at=_onnxruntime_refuses_at,
            default_schemes=("w4a16g64", "w8a16g64"),
        ),
    )
}


def find_target(name: str) -> Target:
    """The target called `name`. Raises InvalidRequest, which lists the known ones."""
    if name not in TARGETS:
        raise InvalidRequest(f"'{name}' is not a target", field="target", value=name, accepted=sorted(TARGETS))
    return TARGETS[name]
