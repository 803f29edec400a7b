"""ModelOpt's side of rivals.py, run by ModelOpt's own environment: nothing of this project is imported.

`python modelopt_allocate.py STUDY MODEL INPUTS.npz --bits B… --budgets A… [--grouped]` scores once, solves for every
budget, and prints, as the last line, JSON: every layer's bits by budget, and the seconds of each phase. With
`--grouped`, as ModelOpt does if nobody tells it otherwise, q, k and v share their bits, and gate and up theirs.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import torch.nn.functional as F  # noqa: N812
from modelopt.torch.quantization.algorithms import AutoQuantizeSearcher
from modelopt.torch.quantization.nn import QuantLinearConvBase
from modelopt.torch.quantization.tensor_quant import QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL
from side import GROUP, Question, answer, asked, timed
from torch import Tensor, nn

Batch = dict[str, Tensor]

HEAD = "*lm_head*"


@dataclass(frozen=True)
class Subject:
    """A model, how it is fed, and the loss whose gradient ModelOpt's score is made of.

    `scales` says how scales lie on a weight; `size`: samples at a time; `ignored`: patterns of layers left alone.
    """

    model: nn.Module
    forward: Callable[[nn.Module, Batch], Any]
    loss: Callable[[Any, Batch], Tensor]
    scales: dict[str, Any]
    size: int
    ignored: tuple[str, ...] = ()


def main() -> None:
    """Search with the gradient score, every phase timed."""
    question = asked(__doc__ or "", SUBJECTS)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    subject = SUBJECTS[question.study](question.model)
    seconds = timed(AutoQuantizeSearcher, "before_search", "estimate_sensitivity_scores", "run_search")
    began = time.perf_counter()
    state = search(subject, question)
    whole = time.perf_counter() - began
    answer(
        "nvidia-modelopt",
        subject.model,
        {budget: solve(state, budget) for budget in question.budgets},
        {
            # What happens before the search is calibration, scoring, and little else.
            "calibration": seconds["before_search"][0] - seconds["estimate_sensitivity_scores"][0],
            "scoring": seconds["estimate_sensitivity_scores"][0],
            "solving": seconds["run_search"][0],
            "whole run for one budget": whole,
        },
    )


def search(subject: Subject, question: Question) -> dict[str, Any]:
    """The state of `auto_quantize` after a search for the first budget; it holds every layer's score at every width."""
    if not question.grouped:
        AutoQuantizeSearcher.quant_grouping_rules.clear()
    inputs = {name: torch.from_numpy(samples).split(subject.size) for name, samples in question.inputs.items()}
    batches = [dict(zip(inputs, batch, strict=True)) for batch in zip(*inputs.values(), strict=True)]
    formats = [weights_only({"num_bits": bits, **subject.scales}) for bits in question.bits]
    _, state = mtq.auto_quantize(
        subject.model,
        constraints={
            "effective_bits": question.budgets[0],
            # The budget is that of the searched layers alone.
            "cost": {"excluded_module_name_patterns": list(subject.ignored)},
        },
        quantization_formats=formats,
        # Else a layer might also stay as it is.
        module_search_spaces=[
            {"module_name_patterns": ["*"], "quantization_formats": formats, "allow_no_quant": False}
        ],
        data_loader=batches,
        forward_step=subject.forward,
        loss_func=subject.loss,
        disabled_layers=list(subject.ignored),
        # Formats that only round weights need no calibration data.
        num_calib_steps=1,
        num_score_steps=len(batches),
        method="gradient",
    )
    return state


def weights_only(weights: dict[str, Any]) -> dict[str, Any]:
    """A format that rounds weights between their extremes, and nothing else."""
    return {
        "quant_cfg": [
            {"quantizer_name": "*weight_quantizer", "cfg": weights},
            {"quantizer_name": "*input_quantizer", "enable": False},
        ],
        "algorithm": "max",
    }


def solve(state: dict[str, Any], budget: float) -> dict[str, int]:
    """Every layer's bits, as ModelOpt's integer program chooses them from the scores."""
    suffix = ".weight_quantizer"
    return {
        entry["quantizer_name"].removesuffix(suffix): entry["cfg"]["num_bits"]
        for entry in mtq.get_auto_quantize_config(state, {"effective_bits": budget})["quant_cfg"]
        if entry["quantizer_name"].endswith(suffix) and "cfg" in entry
    }


def smollm2(file: str) -> Subject:
    """A GGUF file of a causal language model, with the loss of the next token."""
    from transformers import AutoModelForCausalLM

    folder, name = Path(file).parent, Path(file).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, local_files_only=True)
    return Subject(
        model.eval(),
        lambda model, batch: model(**batch, labels=batch["input_ids"], use_cache=False),
        lambda output, batch: output.loss,
        {"block_sizes": {-1: GROUP}},
        size=1,
        ignored=(HEAD,),
    )


def minilm(folder: str) -> Subject:
    """A sentence encoder: the mean of its token states, of length 1.

    It has no labels, and the distance to its own embedding has no gradient. ModelOpt's score supposes the loss to be a
    negative log-likelihood, so the label is drawn from the model taken as a Gaussian around its embedding, and the loss
    is the squared distance to it: on average, the score is then that of the squared distance's Gauss-Newton matrix.
    """
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, add_pooling_layer=False)

    def embed(model: nn.Module, batch: Batch) -> Tensor:
        kept = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((model(**batch).last_hidden_state * kept).sum(1) / kept.sum(1), dim=-1)

    def distance(embedding: Tensor, batch: Batch) -> Tensor:
        label = embedding.detach() + torch.randn_like(embedding)
        return (embedding - label).square().sum(-1).mean()

    return Subject(model.eval(), embed, distance, {"block_sizes": {-1: GROUP}}, size=8)


def efficientnet(file: str) -> Subject:
    """EfficientNet-Lite0, with the cross-entropy of the class that it sees in an image itself."""
    from efficientnet_lite_pytorch import EfficientNet
    from efficientnet_lite_pytorch.utils import Conv2dStaticSamePadding

    # Unless it is told, ModelOpt passes over convolutions that have a forward of their own.
    mtq.register(Conv2dStaticSamePadding, _Convolution)
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return Subject(
        model.eval(),
        lambda model, batch: model(batch["pixel_values"]),
        lambda logits, batch: F.cross_entropy(logits, logits.argmax(-1)),
        {"axis": 0},
        size=8,
    )


class _Convolution(QuantLinearConvBase):
    default_quant_desc_weight = QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL


SUBJECTS = {"smollm2": smollm2, "minilm": minilm, "efficientnet": efficientnet}
"""How each study's model is loaded from its file or folder."""


if __name__ == "__main__":
    main()
