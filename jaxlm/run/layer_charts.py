"""The report's charts of layers, for a run with log.layer_stats."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxlm.run.curves import POINTS, History, drawn
from jaxlm.run.pages import Lines

MOST_POINTS = 3000  # of all curves of a chart
CHARTS = (  # (metric, title, unit, logarithmic, note)
    ("layers/grad_norm", "Norm of the gradient, by layer", "norm", True, "Before clipping, on a logarithmic axis."),
    (
        "layers/update_ratio",
        "Update divided by weights, by layer",
        "ratio of norms",
        True,
        "On a logarithmic axis.",
    ),
    (
        "layers/activation_rms",
        "Activations, by layer",
        "root mean square",
        False,
        "Of the residual stream behind the layer, over the global batch.",
    ),
)


def layer_charts(run: History, several: bool) -> list[Lines]:
    """Three charts over tokens with a curve for each layer; none if the run has no such numbers.

    Args:
      several: the page shows other runs, too, so that titles name this one.
    """
    found, count = [], run.config["model.num_layers"]
    for key, title, unit, log_y, note in CHARTS:
        if key in run.layers:
            curves = _curves(run, key, log_y)
            note += f" {len(curves)} of {count} layers." * (len(curves) < count)
            note += " Means of neighbouring steps." * (len(run.layers[key].steps) > _points(curves))
            if any(x for x, _ in curves.values()):
                title += f", {run.name}" * several
                found.append(Lines(title, "tokens", unit, curves, False, log_y, note, ordered=True))
    return found


def _curves(run: History, key: str, positive: bool) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    (steps, columns), curves = run.layers[key], {}
    for layer, y in columns.items():
        shown = np.where(y > 0, y, np.nan) if positive else y
        curves[f"layer {layer}"] = drawn(steps * run.tokens_per_step, shown, _points(columns)).line
    return curves


def _points(curves: Mapping[str, object]) -> int:
    return min(POINTS, MOST_POINTS // len(curves))
