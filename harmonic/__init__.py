"""Harmonic heads: output layers of language models that score a token by a distance.

The logit of a token is `-n log d(h, w)`. Here h is the last hidden state, w the token's prototype
(its row of the output matrix), d a distance from `DISTANCES` and n the exponent.

Start with `HarmonicHead`, a module, or `harmonic_loss`, a function. `swap_head` puts a head into a
model of transformers. The package works with any PyTorch model.
"""

from .distances import CONTROLS, DISTANCES, HEADS, Distance, add_distance
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
    "add_distance",
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
