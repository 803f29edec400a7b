"""AutoRound's side of rivals.py, run by AutoRound's own environment: nothing of this project is imported.

`python autoround_allocate.py STUDY MODEL INPUTS.npz --bits B… --budgets A…` has AutoScheme score once, solves for every
budget, and prints, as the last line, JSON: every layer's bits by budget, and the seconds of each phase.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch
from auto_round import AutoScheme
from auto_round.auto_scheme import delta_loss
from auto_round.auto_scheme.gen_auto_scheme import GenScheme
from auto_round.calib_dataset import register_dataset
from auto_round.schemes import QuantizationScheme
from datasets import Dataset
from side import GROUP, Question, answer, asked, timed
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

HEAD = "lm_head"
TOKENS = "tokens"
"""What AutoRound calls the calibration samples."""


def main() -> None:
    """Search with AutoScheme, every phase timed."""
    # Its score asks the model for a loss of its own, and knows no layer but linear ones.
    question = asked(__doc__ or "", {"smollm2": None})
    folder, name = Path(question.model).parent, Path(question.model).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    register_dataset(TOKENS)(
        lambda *_, **__: Dataset.from_dict({name: list(samples) for name, samples in question.inputs.items()})
    )
    scoring = timed(delta_loss, "get_score_for_scheme", "choose_bits_per_layer_with_path")
    budgets: dict[float, dict[str, int]] = {}
    whole = []
    # Scores are kept by the data set's name, which does not say what is in it, so nothing is kept from run to run.
    with tempfile.TemporaryDirectory() as scores:
        os.environ["AR_AUTO_SCHEME_CACHE"] = scores
        for budget in question.budgets:
            began = time.perf_counter()
            budgets[budget] = search(model.eval(), tokenizer, question, budget)
            whole.append(time.perf_counter() - began)
    answer(
        "auto-round",
        model,
        budgets,
        {
            "calibration": 0.0,
            "scoring": sum(scoring["get_score_for_scheme"]),
            "solving": scoring["choose_bits_per_layer_with_path"][0],
            "whole run for one budget": whole[0],
        },
    )


def search(model: nn.Module, tokenizer: object, question: Question, budget: float) -> dict[str, int]:
    """Every layer's bits within a budget; layers are scored in the first search alone."""
    samples, length = question.inputs["input_ids"].shape
    scheme = AutoScheme(
        avg_bits=budget,
        options=[QuantizationScheme(bits=bits, group_size=GROUP, sym=True, act_bits=16) for bits in question.bits],
        ignore_scale_zp_bits=True,
        nsamples=samples,
        seqlen=length,
        # Else weights that are not in use are read again from a checkpoint's folder, and a GGUF file is none.
        low_cpu_mem_usage=False,
    )
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != HEAD]
    generator = GenScheme(scheme, model, layers, {}, TOKENS, "cpu", tokenizer, enable_torch_compile=False)
    chosen = generator.get_layer_config()
    return {name: chosen[name]["bits"] for name in layers}


if __name__ == "__main__":
    main()
