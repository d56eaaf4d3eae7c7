"""The language model: embedding, stacked blocks, head; its configuration and the published sizes."""

from tttlm.model.config import (
    PRESETS,
    AttentionConfig,
    Mamba2Config,
    MambaConfig,
    ModelConfig,
    TTTConfig,
)
from tttlm.model.language_model import LanguageModel

__all__ = [
    "PRESETS",
    "AttentionConfig",
    "LanguageModel",
    "Mamba2Config",
    "MambaConfig",
    "ModelConfig",
    "TTTConfig",
]
