"""TTT: a scan over time whose state is a model, which is trained on the tokens of the sequence.

A `Learner` describes the model, its loss, its optimiser and its clocks; `learn` computes it. `published` has the
learners of the literature as descriptions; `models`, `losses` and `transforms` have the components for others.
"""

from tttlm.ops.ttt import published
from tttlm.ops.ttt.description import Clocks, Gate, Learner, Optimizer, Ridge
from tttlm.ops.ttt.learn import IMPLEMENTATIONS, check_choice, choose, learn, supported
from tttlm.ops.ttt.learner_state import LearnerInputs, LearnerState, init_learner_state
from tttlm.ops.ttt.neighbors import Neighbors, neighbor_writes
from tttlm.ops.ttt.problem import Implementation, Problem, Shapes
from tttlm.ops.ttt.state import InnerLayer, InnerNorm
from tttlm.ops.ttt.statistics import InnerStatistics, learner_statistics

__all__ = [
    "IMPLEMENTATIONS",
    "Clocks",
    "Gate",
    "Implementation",
    "InnerLayer",
    "InnerNorm",
    "InnerStatistics",
    "Learner",
    "LearnerInputs",
    "LearnerState",
    "Neighbors",
    "Optimizer",
    "Problem",
    "Ridge",
    "Shapes",
    "check_choice",
    "choose",
    "init_learner_state",
    "learn",
    "learner_statistics",
    "neighbor_writes",
    "published",
    "supported",
]
