"""One folder for each mixer: its configuration, layer, cost, sharding and requirements; and the registry of mixers.

A mixer is a sequence layer as a language model uses it. To add one, write a folder here, or register a mixer from
outside the package (`register`); see docs/adding-a-mixer.md.
"""

from tttlm.mixers.attention import Attention, AttentionConfig
from tttlm.mixers.learners import (
    ATLAS,
    GLA,
    KDA,
    TNT,
    TTT,
    Comba,
    DeltaNet,
    DeltaProduct,
    GatedDeltaNet,
    InPlaceTTT,
    LaCT,
    Longhorn,
    MemoryAsContext,
    MemoryAsGate,
    MesaNet,
    SharedWindow,
    Titans,
)
from tttlm.mixers.mamba import Mamba, MambaConfig
from tttlm.mixers.mamba2 import Mamba2, Mamba2Config
from tttlm.mixers.registry import Mixer, ModelShape, mixer_names, register, registered, section_of
from tttlm.mixers.ttt import TTTMLP, MiniBatchTTT, TTTConfig, TTTLinear

__all__ = [
    "ATLAS",
    "GLA",
    "KDA",
    "TNT",
    "TTT",
    "TTTMLP",
    "Attention",
    "AttentionConfig",
    "Comba",
    "DeltaNet",
    "DeltaProduct",
    "GatedDeltaNet",
    "InPlaceTTT",
    "LaCT",
    "Longhorn",
    "Mamba",
    "Mamba2",
    "Mamba2Config",
    "MambaConfig",
    "MemoryAsContext",
    "MemoryAsGate",
    "MesaNet",
    "MiniBatchTTT",
    "Mixer",
    "ModelShape",
    "SharedWindow",
    "TTTConfig",
    "TTTLinear",
    "Titans",
    "mixer_names",
    "register",
    "registered",
    "section_of",
]
