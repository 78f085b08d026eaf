"""Where `integrations/transformers.py` was when models were saved whose folders import it from
here."""

from .integrations.transformers import Swapped, harmonic_class, load_swapped, swap_head

__all__ = ["Swapped", "harmonic_class", "load_swapped", "swap_head"]
