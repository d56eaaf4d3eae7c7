"""TTT: a scan over time whose carried state is a model, trained on the tokens as they come.

A `Learner` describes the model, its loss, its optimiser and its clocks; `learn` computes it. `published` has the
learners of the literature as descriptions, `models`, `losses` and `transforms` the parts to make others of.
"""

from tttlm.ops.ttt.description import Clocks, Gate, Learner, Optimizer, Ridge
from tttlm.ops.ttt.learn import IMPLEMENTATIONS, learn, supported
from tttlm.ops.ttt.learner_state import LearnerInputs, LearnerState, init_learner_state
from tttlm.ops.ttt.neighbors import Neighbors, neighbor_writes
from tttlm.ops.ttt.problem import Implementation, Problem, Shapes
from tttlm.ops.ttt.scan import ttt_scan
from tttlm.ops.ttt.state import InnerLayer, InnerNorm, InnerState, init_inner_state
from tttlm.ops.ttt.statistics import InnerStatistics, inner_statistics

__all__ = [
    "IMPLEMENTATIONS",
    "Clocks",
    "Gate",
    "Implementation",
    "InnerLayer",
    "InnerNorm",
    "InnerState",
    "InnerStatistics",
    "Learner",
    "LearnerInputs",
    "LearnerState",
    "Neighbors",
    "Optimizer",
    "Problem",
    "Ridge",
    "Shapes",
    "init_inner_state",
    "init_learner_state",
    "inner_statistics",
    "learn",
    "neighbor_writes",
    "supported",
    "ttt_scan",
]
