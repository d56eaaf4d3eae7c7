"""Sequence layers for any Flax NNX model, all with the same interface.

`layer(x)` maps `[B, T, D]` to `[B, T, D]`; `layer.extend(x, state)` continues from a state and returns the next one;
`layer.init_state(batch)` is the state before the first token. However a sequence is cut, the outputs are the same.
The layers are defined in `tttlm.mixers`, each with the code that a language model needs for it.
"""

from tttlm.mixers import (
    ATLAS,
    GLA,
    KDA,
    TNT,
    TTT,
    TTTMLP,
    Attention,
    Comba,
    DeltaNet,
    DeltaProduct,
    GatedDeltaNet,
    InPlaceTTT,
    LaCT,
    Longhorn,
    Mamba,
    Mamba2,
    MemoryAsContext,
    MemoryAsGate,
    MesaNet,
    MiniBatchTTT,
    SharedWindow,
    Titans,
    TTTLinear,
)
from tttlm.parts.bidirectional import Bidirectional, scan_image

__all__ = [
    "ATLAS",
    "GLA",
    "KDA",
    "TNT",
    "TTT",
    "TTTMLP",
    "Attention",
    "Bidirectional",
    "Comba",
    "DeltaNet",
    "DeltaProduct",
    "GatedDeltaNet",
    "InPlaceTTT",
    "LaCT",
    "Longhorn",
    "Mamba",
    "Mamba2",
    "MemoryAsContext",
    "MemoryAsGate",
    "MesaNet",
    "MiniBatchTTT",
    "SharedWindow",
    "TTTLinear",
    "Titans",
    "scan_image",
]
