"""Mamba-2."""

from tttlm.mixers.mamba2.layer import Mamba2, Mamba2State
from tttlm.mixers.mamba2.mixer import Mamba2Config, Mamba2Mixer

__all__ = ["Mamba2", "Mamba2Config", "Mamba2Mixer", "Mamba2State"]
