"""Test-time-training layers and language models of them, in JAX and Flax.

The names in `__all__` here and in the `__all__` of subpackages are public; other names may change without notice. Names
and subpackages are loaded on first use, so that `import tttlm` is fast.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tttlm.inference import generate
    from tttlm.interop import from_pretrained, push_to_hub, save_pretrained
    from tttlm.layers import TTTMLP, Attention, Mamba, Mamba2, TTTLinear
    from tttlm.model import LanguageModel, ModelConfig

__version__ = "0.2.0"

_HOMES = {
    "Attention": "tttlm.layers",
    "Mamba": "tttlm.layers",
    "Mamba2": "tttlm.layers",
    "TTTLinear": "tttlm.layers",
    "TTTMLP": "tttlm.layers",
    "LanguageModel": "tttlm.model",
    "ModelConfig": "tttlm.model",
    "from_pretrained": "tttlm.interop",
    "generate": "tttlm.inference",
    "push_to_hub": "tttlm.interop",
    "save_pretrained": "tttlm.interop",
}
_ROOMS = tuple(room.name for room in pkgutil.iter_modules(__path__) if room.ispkg and room.name != "cli")
__all__ = [
    "TTTMLP",
    "Attention",
    "LanguageModel",
    "Mamba",
    "Mamba2",
    "ModelConfig",
    "TTTLinear",
    "from_pretrained",
    "generate",
    "push_to_hub",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"tttlm.{name}")
    raise AttributeError(f"module 'tttlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS})
