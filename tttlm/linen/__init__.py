"""The layers of `tttlm.layers` as Flax Linen modules, with the same computation and the same parameter names.

They are used like any other Linen module, also within `@nn.compact`, `nn.scan` and `nn.remat`; `extend` and
`init_state` are methods of the module. `to_linen` and `to_nnx` convert parameters between NNX and Linen.
"""

from tttlm import layers
from tttlm.linen.module import SequenceModule, linen_layer
from tttlm.linen.parameters import to_linen, to_nnx

ATLAS = linen_layer(layers.ATLAS)
Attention = linen_layer(layers.Attention)
Comba = linen_layer(layers.Comba)
DeltaNet = linen_layer(layers.DeltaNet)
DeltaProduct = linen_layer(layers.DeltaProduct)
GatedDeltaNet = linen_layer(layers.GatedDeltaNet)
GLA = linen_layer(layers.GLA)
InPlaceTTT = linen_layer(layers.InPlaceTTT)
KDA = linen_layer(layers.KDA)
LaCT = linen_layer(layers.LaCT)
Longhorn = linen_layer(layers.Longhorn)
Mamba = linen_layer(layers.Mamba)
Mamba2 = linen_layer(layers.Mamba2)
MesaNet = linen_layer(layers.MesaNet)
MiniBatchTTT = linen_layer(layers.MiniBatchTTT)
Titans = linen_layer(layers.Titans)
TNT = linen_layer(layers.TNT)
TTT = linen_layer(layers.TTT)
TTTLinear = linen_layer(layers.TTTLinear)
TTTMLP = linen_layer(layers.TTTMLP)

__all__ = [
    "ATLAS",
    "GLA",
    "KDA",
    "TNT",
    "TTT",
    "TTTMLP",
    "Attention",
    "Comba",
    "DeltaNet",
    "DeltaProduct",
    "GatedDeltaNet",
    "InPlaceTTT",
    "LaCT",
    "Longhorn",
    "Mamba",
    "Mamba2",
    "MesaNet",
    "MiniBatchTTT",
    "SequenceModule",
    "TTTLinear",
    "Titans",
    "linen_layer",
    "to_linen",
    "to_nnx",
]
