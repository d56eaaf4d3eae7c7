"""Full attention, and attention over a sliding window."""

from tttlm.mixers.attention.attend import AttentionState
from tttlm.mixers.attention.layer import Attention
from tttlm.mixers.attention.mixer import AttentionConfig, AttentionMixer

__all__ = ["Attention", "AttentionConfig", "AttentionMixer", "AttentionState"]
