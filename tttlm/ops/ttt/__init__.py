"""TTT: a scan over time whose carried state is a model, updated by a gradient step for every mini-batch of tokens."""

from tttlm.ops.ttt.scan import ttt_scan
from tttlm.ops.ttt.state import InnerLayer, InnerNorm, InnerState, init_inner_state
from tttlm.ops.ttt.statistics import InnerStatistics, inner_statistics

__all__ = [
    "InnerLayer",
    "InnerNorm",
    "InnerState",
    "InnerStatistics",
    "init_inner_state",
    "inner_statistics",
    "ttt_scan",
]
