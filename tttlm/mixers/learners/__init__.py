"""Layers of published learners, and the general one for a learner of the reader's own.

What a paper has of its own stands in one file: configuration, learner, what is around it, and the mixer's name.
"""

from tttlm.mixers.learners.deltanet import DeltaNet, DeltaNetConfig
from tttlm.mixers.learners.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from tttlm.mixers.learners.gates import TokenGate
from tttlm.mixers.learners.gla import GLA, GLAConfig
from tttlm.mixers.learners.kda import KDA, KDAConfig
from tttlm.mixers.learners.layer import TTT, Conventions, OutputGate, TTTState
from tttlm.mixers.learners.memory import Gates
from tttlm.mixers.learners.mixer import LearnerConfig, LearnerMixer, PublishedLayer

__all__ = [
    "GLA",
    "KDA",
    "TTT",
    "Conventions",
    "DeltaNet",
    "DeltaNetConfig",
    "GLAConfig",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "Gates",
    "KDAConfig",
    "LearnerConfig",
    "LearnerMixer",
    "OutputGate",
    "PublishedLayer",
    "TTTState",
    "TokenGate",
]
