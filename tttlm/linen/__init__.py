"""The layers as Flax Linen modules: the same mathematics, parameters as Linen keeps them.

`init`, `apply`, `@nn.compact`, `nn.scan`, `nn.remat` and the rest work as for any Linen module; `extend` and
`init_state` are methods of it. `to_linen` and `to_nnx` convert parameters between the two, name by name.
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
