"""How well predictions rank what was measured."""

from __future__ import annotations

import numpy as np
import pandas as pd


def spearman(predicted: list[float], measured: list[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than three points, or when either does not vary."""
    if len(predicted) < 3:
        return None
    ranks = pd.DataFrame({"predicted": predicted, "measured": measured}).rank()
    if (ranks.nunique() < 2).any():
        return None
    return float(np.corrcoef(ranks.to_numpy().T)[0, 1])
