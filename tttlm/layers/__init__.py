"""Sequence layers that drop into any Flax NNX model, all under one contract, and the parts they share.

`layer(x)` maps `[B, T, D]` to `[B, T, D]`; `layer.extend(x, state)` goes on from a state and returns the next one;
`layer.init_state(batch)` is the state before the first token. However a sequence is cut, the outputs are the same.
"""

from tttlm.layers.attention import Attention
from tttlm.layers.mamba import Mamba
from tttlm.layers.mamba2 import Mamba2
from tttlm.layers.ttt import TTT, TTTMLP, TTTLinear

__all__ = ["TTT", "TTTMLP", "Attention", "Mamba", "Mamba2", "TTTLinear"]
