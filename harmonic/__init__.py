"""Harmonic heads: unembeddings whose logit for a token is `-n log d(h, w)`, with d any of the
distances in `DISTANCES`.

Imports nothing else of this repository and works with any PyTorch model. See `HarmonicHead` and
`harmonic_loss`; `swap_head` puts one into a model of transformers.
"""

from .distances import CONTROLS, DISTANCES, HEADS, Distance
from .head import HarmonicHead, softmax_linearization_kl
from .integrations.transformers import load_swapped, swap_head
from .links import EXPONENTS, default_scale
from .loss import IGNORE_INDEX, harmonic_logits, harmonic_loss
from .match import match
from .pairwise import contributions, distance, paired_distance
from .prepared import PreparedHead

__version__ = "0.2.0"

__all__ = [
    "CONTROLS",
    "DISTANCES",
    "EXPONENTS",
    "HEADS",
    "IGNORE_INDEX",
    "Distance",
    "HarmonicHead",
    "PreparedHead",
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
