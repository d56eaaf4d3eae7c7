"""The language model: embedding, stacked blocks, head; its configuration and the published sizes."""

from tttlm.mixers import AttentionConfig, Mamba2Config, MambaConfig, TTTConfig
from tttlm.model.config import PRESETS, ModelConfig
from tttlm.model.language_model import LanguageModel, parameter_count

__all__ = [
    "PRESETS",
    "AttentionConfig",
    "LanguageModel",
    "Mamba2Config",
    "MambaConfig",
    "ModelConfig",
    "TTTConfig",
    "parameter_count",
]
