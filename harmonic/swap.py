"""The old name of `integrations/transformers.py`, which folders of older versions import."""

from .integrations.transformers import Swapped, harmonic_class, load_swapped, swap_head

__all__ = ["Swapped", "harmonic_class", "load_swapped", "swap_head"]
