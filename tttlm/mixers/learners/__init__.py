"""Layers of published learners, and the general layer for any learner.

Each paper has one file with its configuration, its learner, the other parts of its layer, and the mixer's name.
"""

from tttlm.mixers.learners.atlas import ATLAS, ATLASConfig
from tttlm.mixers.learners.comba import Comba, CombaConfig
from tttlm.mixers.learners.conventions import Conventions, OutputGate
from tttlm.mixers.learners.deltanet import DeltaNet, DeltaNetConfig
from tttlm.mixers.learners.deltaproduct import DeltaProduct, DeltaProductConfig
from tttlm.mixers.learners.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from tttlm.mixers.learners.gates import TokenGate
from tttlm.mixers.learners.gla import GLA, GLAConfig
from tttlm.mixers.learners.hybrids import HybridState, MemoryAsContext, MemoryAsGate
from tttlm.mixers.learners.inplace_ttt import InPlaceTTT, InPlaceTTTConfig
from tttlm.mixers.learners.kda import KDA, KDAConfig
from tttlm.mixers.learners.lact import LaCT, LaCTConfig
from tttlm.mixers.learners.layer import TTT, TTTState
from tttlm.mixers.learners.longhorn import Longhorn, LonghornConfig
from tttlm.mixers.learners.memory import Gates
from tttlm.mixers.learners.mesanet import MesaNet, MesaNetConfig
from tttlm.mixers.learners.mixer import ChunkedConfig, ImplementationConfig, LearnerConfig, LearnerMixer, PublishedLayer
from tttlm.mixers.learners.titans import Titans, TitansConfig
from tttlm.mixers.learners.titans_hybrids import TitansContextConfig, TitansGateConfig
from tttlm.mixers.learners.tnt import TNT, TNTConfig
from tttlm.mixers.learners.window import SharedWindow

__all__ = [
    "ATLAS",
    "GLA",
    "KDA",
    "TNT",
    "TTT",
    "ATLASConfig",
    "ChunkedConfig",
    "Comba",
    "CombaConfig",
    "Conventions",
    "DeltaNet",
    "DeltaNetConfig",
    "DeltaProduct",
    "DeltaProductConfig",
    "GLAConfig",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "Gates",
    "HybridState",
    "ImplementationConfig",
    "InPlaceTTT",
    "InPlaceTTTConfig",
    "KDAConfig",
    "LaCT",
    "LaCTConfig",
    "LearnerConfig",
    "LearnerMixer",
    "Longhorn",
    "LonghornConfig",
    "MemoryAsContext",
    "MemoryAsGate",
    "MesaNet",
    "MesaNetConfig",
    "OutputGate",
    "PublishedLayer",
    "SharedWindow",
    "TNTConfig",
    "TTTState",
    "Titans",
    "TitansConfig",
    "TitansContextConfig",
    "TitansGateConfig",
    "TokenGate",
]
