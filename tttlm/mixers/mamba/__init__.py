"""Mamba."""

from tttlm.mixers.mamba.layer import Mamba, MambaState
from tttlm.mixers.mamba.mixer import MambaConfig, MambaMixer

__all__ = ["Mamba", "MambaConfig", "MambaMixer", "MambaState"]
