"""A place for each mixer: its configuration, layer, cost, sharding and needs; and the register that joins them.

A mixer is a sequence layer as a language model uses it. Whoever adds one writes one folder here, or registers one from
outside the package (`register`); docs/adding-a-mixer.md says how.
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
    MesaNet,
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
    "MesaNet",
    "MiniBatchTTT",
    "Mixer",
    "ModelShape",
    "TTTConfig",
    "TTTLinear",
    "Titans",
    "mixer_names",
    "register",
    "registered",
    "section_of",
]
