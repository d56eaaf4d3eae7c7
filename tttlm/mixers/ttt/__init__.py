"""TTT-Linear and TTT-MLP: layers whose hidden state is a model that learns at test time."""

from tttlm.mixers.ttt.layer import TTTMLP, MiniBatchTTT, TTTLinear, TTTState
from tttlm.mixers.ttt.mixer import TTTConfig, TTTMixer

__all__ = ["TTTMLP", "MiniBatchTTT", "TTTConfig", "TTTLinear", "TTTMixer", "TTTState"]
