"""TTT-Linear and TTT-MLP: layers whose hidden state is a model that learns at test time."""

from tttlm.mixers.ttt.layer import TTT, TTTMLP, TTTLinear, TTTState
from tttlm.mixers.ttt.mixer import TTTConfig, TTTMixer

__all__ = ["TTT", "TTTMLP", "TTTConfig", "TTTLinear", "TTTMixer", "TTTState"]
