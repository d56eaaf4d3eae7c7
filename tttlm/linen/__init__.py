"""The layers of `tttlm.layers` as Flax Linen modules, with the same computation and the same parameter names.

They are used like any other Linen module, also within `@nn.compact`, `nn.scan` and `nn.remat`; `extend` and
`init_state` are methods of the module. `to_linen` and `to_nnx` convert parameters between NNX and Linen.
"""

from tttlm import layers
from tttlm.linen.module import SequenceModule, linen_layer
from tttlm.linen.parameters import to_linen, to_nnx

Attention = linen_layer(layers.Attention)
DeltaNet = linen_layer(layers.DeltaNet)
GatedDeltaNet = linen_layer(layers.GatedDeltaNet)
Mamba = linen_layer(layers.Mamba)
Mamba2 = linen_layer(layers.Mamba2)
TTTLinear = linen_layer(layers.TTTLinear)
TTTMLP = linen_layer(layers.TTTMLP)

__all__ = [
    "TTTMLP",
    "Attention",
    "DeltaNet",
    "GatedDeltaNet",
    "Mamba",
    "Mamba2",
    "SequenceModule",
    "TTTLinear",
    "linen_layer",
    "to_linen",
    "to_nnx",
]
