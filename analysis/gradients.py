"""How steady training was: the gradient norms before clipping, head and trunk apart, loss spikes, and the growth of weights.

    python -m analysis.gradients out/a out/b

"Gradient stability" has no definition in the papers. Here: mean and coefficient of variation (standard deviation over mean) after warm-up,
the spike rate (share of steps whose norm is above SPIKE times the median of the WINDOW steps before) and the clip rate.
"""

import math

import numpy as np

SPIKE, WINDOW = 3.0, 50  # times the running median; steps


def stability(metrics: list[dict], clip: float = 1.0, key: str = "grad_norm", skip: float = 0.1) -> dict:
    """Gradient-norm stability of a run: mean, cv, spike_rate, clip_rate of the norms after the first `skip` of the steps.

    Args:
        metrics: lines of metrics.jsonl. clip: grad_clip, 0 = never. key: grad_norm, grad_norm_head or grad_norm_trunk.
    """
    norms = np.array([float(m[key]) for m in metrics if key in m])
    start = int(len(norms) * skip)
    medians = np.array([np.median(norms[max(0, i - WINDOW) : i]) if i else math.inf for i in range(len(norms))])
    norms, medians = norms[start:], medians[start:]
    if not len(norms):
        return dict.fromkeys(("mean", "cv", "spike_rate", "clip_rate"), math.nan)
    mean = norms.mean()
    return {
        "mean": float(mean),
        "cv": float(norms.std() / mean) if mean else math.nan,
        "spike_rate": float((norms > SPIKE * medians).mean()),
        "clip_rate": float((norms > clip).mean()) if clip else 0.0,
    }
