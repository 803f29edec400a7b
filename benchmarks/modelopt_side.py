"""ModelOpt's side of benchmarks/modelopt.py, run by ModelOpt's own environment: nothing of this project is imported.

`python -P modelopt_side.py MODEL.gguf TOKENS.npy BATCH BITS…` prints, as the last line, JSON: the seconds of each
phase.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.quantization.algorithms import AutoQuantizeGradientSearcher
from transformers import AutoModelForCausalLM

GROUP = 64
HEAD = "*lm_head*"


def main() -> None:
    """Search with the gradient score, every phase timed."""
    file, tokens, batch_size, *widths = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(
        Path(file).parent, gguf_file=Path(file).name, dtype=torch.float32, local_files_only=True
    ).eval()
    batches = torch.from_numpy(np.load(tokens)).split(int(batch_size))
    seconds = timed("before_search", "estimate_sensitivity_scores", "run_search")
    began = time.perf_counter()
    _, state = mtq.auto_quantize(
        model,
        # Of the searched layers alone, as here.
        constraints={"effective_bits": 4.0, "cost": {"excluded_module_name_patterns": [HEAD]}},
        quantization_formats=[weights_only(int(bits)) for bits in widths],
        data_loader=batches,
        forward_step=lambda model, batch: model(input_ids=batch, labels=batch, use_cache=False),
        loss_func=lambda output, batch: output.loss,
        disabled_layers=[HEAD],
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        method="gradient",
    )
    total = time.perf_counter() - began
    layers = [name for group in state["candidate_stats"].values() for name in group["module_names"]]
    print(
        json.dumps(
            {
                # What happens before the search is calibration, scoring, and little else.
                "calibration": seconds["before_search"] - seconds["estimate_sensitivity_scores"],
                "scoring": seconds["estimate_sensitivity_scores"],
                "solving": seconds["run_search"],
                "total": total,
                "layers": sum("lm_head" not in name for name in layers),
                "version": importlib.metadata.version("nvidia-modelopt"),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            }
        )
    )


def weights_only(bits: int) -> dict[str, Any]:
    """A format that rounds weights in groups along the input, and nothing else."""
    return {
        "quant_cfg": [
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "block_sizes": {-1: GROUP}}},
            {"quantizer_name": "*input_quantizer", "enable": False},
        ],
        "algorithm": "max",
    }


def timed(*methods: str) -> dict[str, float]:
    """The seconds that the named methods of the searcher will have taken."""
    seconds: dict[str, float] = {}

    def measure(name: str, original: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                seconds[name] = time.perf_counter() - began

        return run

    for name in methods:
        setattr(AutoQuantizeGradientSearcher, name, measure(name, getattr(AutoQuantizeGradientSearcher, name)))
    return seconds


if __name__ == "__main__":
    main()
