"""Tiny real models with random weights, and their inventories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from search.inventory import Inventory, Layer
from tests.search.exports.examples import HIDDEN, INNER, VOCABULARY, inventory


def llama(blocks: int = 12, **changes: Any) -> Any:
    """A Llama of 64 × 128; `changes` go to its configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def bert() -> Any:
    """A BERT of two blocks, without a head."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY
    )
    return BertModel(config).eval()


def mixtral() -> Any:
    """A Mixtral of one block with four fused experts."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        num_local_experts=4,
    )
    return MixtralForCausalLM(config).eval()


def save(model: Any, folder: Path) -> Path:
    """Write a checkpoint as a person has it: weights, configuration, and a tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(32 + code): code for code in range(VOCABULARY - 1)} | {"<unk>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    fast.save_pretrained(folder)
    return folder


def inventory_of(model: Any, task: str = "causal-lm") -> Inventory:
    """The linear and embedding layers and the fused experts of a model, in the order of its modules."""
    import torch

    layers = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            layers.append(Layer(name, "linear", module.out_features, module.in_features, block=_block(name)))
        elif isinstance(module, torch.nn.Embedding):
            layers.append(Layer(name, "embedding", module.num_embeddings, module.embedding_dim))
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                rows, full = parameter.shape[0] * parameter.shape[1], f"{name}.{leaf}"
                layers.append(Layer(full, "experts", rows, parameter.shape[2], block=_block(name)))
    return inventory(layers, type(model).__name__, task)


def _block(name: str) -> str | None:
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else None
