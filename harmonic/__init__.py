"""Harmonic heads: unembeddings whose logit for a token is `-n log d(h, w)`, with d any of the distances in `DISTANCES`.

Imports nothing else of this repository and works with any PyTorch model. See `HarmonicHead` and `harmonic_loss`; `swap_head` puts one into
a model of transformers.
"""

from harmonic.distances import CONTROLS, DISTANCES, EXPONENTS, HEADS, Distance, contributions, distance, paired_distance
from harmonic.loss import IGNORE_INDEX, HarmonicHead, default_scale, harmonic_logits, harmonic_loss, softmax_linearization_kl
from harmonic.match import match
from harmonic.swap import load_swapped, swap_head

__all__ = [
    "CONTROLS",
    "DISTANCES",
    "EXPONENTS",
    "HEADS",
    "IGNORE_INDEX",
    "Distance",
    "HarmonicHead",
    "contributions",
    "default_scale",
    "distance",
    "harmonic_logits",
    "harmonic_loss",
    "load_swapped",
    "match",
    "paired_distance",
    "softmax_linearization_kl",
    "swap_head",
]
