"""Inventories and points to export. Imports `search` only: the peers' environments have little else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from search.candidate import Candidate
from search.errors import ExportRefused
from search.exports import Exported, render
from search.inventory import Inventory, Layer
from search.scheme import Scheme
from search.space import tie
from search.targets import find_target

HIDDEN, INNER, VOCABULARY = 64, 128, 96
"""Sizes of `llama`; its keys and values have half as many rows."""


def llama(blocks: int = 12) -> Inventory:
    """A tiny Llama: enough blocks that the name of one begins that of another (1 and 11)."""
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    layers = [
        Layer("model.embed_tokens", "embedding", VOCABULARY, HIDDEN),
        *(
            Layer(f"model.layers.{number}.{name}", "linear", *shape, block=f"model.layers.{number}")
            for number in range(blocks)
            for name, shape in shapes.items()
        ),
        Layer("lm_head", "linear", VOCABULARY, HIDDEN),
    ]
    return inventory(layers, "LlamaForCausalLM")


def bert(blocks: int = 2) -> Inventory:
    """A tiny BERT without a head: its attention is named otherwise under vLLM."""
    linear = {
        "attention.self.query": (HIDDEN, HIDDEN),
        "attention.self.key": (HIDDEN, HIDDEN),
        "attention.self.value": (HIDDEN, HIDDEN),
        "attention.output.dense": (HIDDEN, HIDDEN),
        "intermediate.dense": (INNER, HIDDEN),
        "output.dense": (HIDDEN, INNER),
    }
    layers = [
        Layer("embeddings.word_embeddings", "embedding", VOCABULARY, HIDDEN),
        *(
            Layer(f"encoder.layer.{number}.{name}", "linear", *shape, block=f"encoder.layer.{number}")
            for number in range(blocks)
            for name, shape in linear.items()
        ),
        Layer("pooler.dense", "linear", HIDDEN, HIDDEN),
    ]
    return inventory(layers, "BertModel", "embedding")


def mixtral(blocks: int = 1, experts: int = 4) -> Inventory:
    """A tiny Mixtral with fused experts."""
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.experts.gate_up_proj": (experts * 2 * INNER, HIDDEN),
        "mlp.experts.down_proj": (experts * HIDDEN, INNER),
    }
    layers = [
        Layer("model.embed_tokens", "embedding", VOCABULARY, HIDDEN),
        *(
            Layer(
                f"model.layers.{number}.{name}",
                "experts" if "experts" in name else "linear",
                *shape,
                block=f"model.layers.{number}",
            )
            for number in range(blocks)
            for name, shape in shapes.items()
        ),
        Layer("lm_head", "linear", VOCABULARY, HIDDEN),
    ]
    return inventory(layers, "MixtralForCausalLM")


def inventory(layers: Sequence[Layer], architecture: str = "SomeModel", task: str = "causal-lm") -> Inventory:
    """A model of these layers and no other parameters."""
    return Inventory("0" * 64, architecture, task, sum(layer.weights for layer in layers), tuple(layers))


def dealt(model: Inventory, schemes: Sequence[str], target: str = "vllm") -> dict[str, str]:
    """Schemes dealt out in turn to the units that `target` searches."""
    found = find_target(target)
    units = tie([layer for layer in model.layers if found.refuses(layer) is None], found)
    return {layer.name: schemes[i % len(schemes)] for i, unit in enumerate(units) for layer in unit.layers}


def exported(
    model: Inventory, allocation: Mapping[str, str | Scheme], target: str = "vllm", quantizer: str = "mse"
) -> Exported:
    """A measured point with this allocation."""
    point = Candidate(
        3,
        "ilp",
        "kl at 5.25 bits",
        {name: str(scheme) for name, scheme in allocation.items()},
        predicted={"kl": 0.5},
        costs={"avg_bits": 5.25, "size_bytes": 1000.0},
        metrics={"loss": 0.25, "loss_stderr": 0.01},
    )
    return Exported("a-model", model, target, quantizer, point)


def refused(name: str, model: Inventory, allocation: Mapping[str, str | Scheme]) -> ExportRefused:
    """What format `name` refuses the point with; fails where it takes it."""
    with pytest.raises(ExportRefused) as caught:
        render(name, exported(model, allocation))
    return caught.value
