"""Models of any mixers, small and with weights large enough that what was read shows in what comes next."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tttlm.mixers import mixer_names
from tttlm.model import AttentionConfig, LanguageModel, Mamba2Config, ModelConfig, TTTConfig

SMALL = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    intermediate_size=16,
    ttt=TTTConfig(mini_batch_size=4),
    attention=AttentionConfig(max_length=96, sliding_window=9),
    mamba2=Mamba2Config(head_dim=8, state_size=8),
    remat="none",
)
MIXERS = tuple(name for name in mixer_names() if name != "average")  # a test registers that one


def hybrid() -> LanguageModel:
    """A model of a mixer with mini-batches and one with a cache."""
    return made("ttt_linear", "attention")


@cache
def made(*mixers: str, **changes) -> LanguageModel:
    config = replace(SMALL, mixers=mixers, **{"num_layers": len(mixers), **changes})
    model = nnx.jit(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))()
    nnx.update(model, jax.tree.map(lambda x: x * 4, nnx.state(model, nnx.Param)))
    return model


def ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50, length)


@cache
def _forward():
    return nnx.jit(lambda model, tokens: model(tokens))


def logits_of(model: LanguageModel, tokens: np.ndarray, length: int = 64) -> np.ndarray:
    """Logits `[T, V]` of the whole forward pass; compiled for one length, which what comes behind does not change."""
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward()(model, jnp.asarray(padded)))[0, : len(tokens)]
