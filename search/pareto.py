"""Dominance: which points no other one betters, how much they dominate together, and which of them stands out.

Objectives are points × objectives, all minimised; a row with a NaN is as if it were not there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def undominated(objectives: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Mask of the rows of a points × objectives array (all minimised) that no other row dominates.

    A row dominates another when it is nowhere greater and somewhere smaller. Of equal rows the first stays; a row with
    a NaN never does.
    """
    keep: NDArray[np.bool_] = np.asarray(~np.isnan(objectives).any(axis=1))
    if objectives.shape[1] == 2:
        # From the least first objective on, each has to be smaller in the second than all before.
        order = np.lexsort((objectives[:, 1], objectives[:, 0]))
        order = order[keep[order]]
        seconds = objectives[order, 1]
        keep[order[1:]] = seconds[1:] < np.minimum.accumulate(seconds)[:-1]
        return keep
    for row in np.flatnonzero(keep):
        point = objectives[row]
        no_greater = (objectives <= point).all(axis=1) & keep
        smaller = no_greater & (objectives < point).any(axis=1)
        equal_before = no_greater & (objectives == point).all(axis=1) & (np.arange(len(objectives)) < row)
        keep[row] = not (smaller | equal_before).any()
    return keep


def hypervolume(objectives: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """The volume that the rows dominate within the corner `reference`; any number of objectives, exact.

    Slices along the last objective (While et al. 2006): in each the volume of the others', times its thickness.
    """
    inside = objectives[undominated(objectives)]
    inside = inside[(inside < reference).all(axis=1)]
    if not len(inside):
        return 0.0
    if len(reference) == 1:
        return float(reference[0] - inside.min())
    inside = inside[inside[:, -1].argsort(kind="stable")]
    thickness = np.diff(inside[:, -1], append=reference[-1])
    return sum(
        hypervolume(inside[: at + 1, :-1], reference[:-1]) * float(thick)
        for at, thick in enumerate(thickness)
        if thick > 0
    )


def knee(objectives: NDArray[np.float64]) -> int | None:
    """The row of a frontier of two objectives that lies farthest below the line between its ends; the first of equals.

    None where fewer than three points leave nothing to stand out, or none lies below the line.
    """
    front = np.flatnonzero(undominated(objectives))
    if len(front) < 3:
        return None
    front = front[objectives[front, 0].argsort(kind="stable")]
    points = objectives[front]
    scaled = (points - points.min(axis=0)) / np.ptp(points, axis=0)
    below = 1 - scaled.sum(axis=1)
    return int(front[below.argmax()]) if below.max() > 0 else None


def best_under(values: NDArray[np.float64], costs: NDArray[np.float64], limits: NDArray[np.float64]) -> int | None:
    """The point of least value whose costs (points × resources) keep all limits; of equals the cheaper, then the first.

    None where none keeps them.
    """
    fits = np.flatnonzero((costs <= limits).all(axis=1) & ~np.isnan(values))
    order = np.lexsort((*costs[fits].T[::-1], values[fits]))
    return int(fits[order[0]]) if len(fits) else None
