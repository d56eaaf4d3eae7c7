"""Small layers of every published learner, in float64 and with weights large enough for what is learned to show."""

import jax.numpy as jnp
from flax import nnx

from tttlm.mixers import Attention
from tttlm.mixers import learners as of
from tttlm.ops.ttt import published

WIDTH, TIME = 16, 12
F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64, "kernel_init": nnx.initializers.normal(0.4)}


def _layer(layer, **config):
    return lambda rngs: layer(WIDTH, layer.heads or 2, layer.Config(**config), rngs=rngs, **F64)


def _hybrid(kind, layer=of.Titans, window=5, **config):
    def build(rngs):
        memory = layer(WIDTH, 2, layer.Config(**config), rngs=rngs, **F64)
        return kind(memory, Attention(WIDTH, 2, sliding_window=window, rngs=rngs, **F64))

    return build


LAYERS = {
    "deltanet": _layer(of.DeltaNet),
    "gated_deltanet": _layer(of.GatedDeltaNet),
    "kda": _layer(of.KDA),
    "deltaproduct": _layer(of.DeltaProduct),
    "comba": _layer(of.Comba),
    "gla": _layer(of.GLA),
    "mesanet": _layer(of.MesaNet),
    "longhorn": _layer(of.Longhorn, head_dim=4, rate_rank=3),
    "titans": _layer(of.Titans, chunk_size=4, inner_learning_rate=1.0),
    "titans_mlp": _layer(of.Titans, chunk_size=4, inner_size=6, inner_learning_rate=1.0),
    "titans_gate": _hybrid(of.MemoryAsGate, chunk_size=4, inner_learning_rate=1.0),
    "titans_context": _hybrid(of.MemoryAsContext, chunk_size=4, inner_learning_rate=1.0),
    "lact": _layer(of.LaCT, chunk_size=4),
    "lact_window": lambda rngs: of.SharedWindow(
        _layer(of.LaCT, chunk_size=4, attention_head_dim=4)(rngs), sliding_window=5, qk_norm=True
    ),
    "tnt": _layer(of.TNT, chunk_size=4, local_chunk_size=2, local_shard_size=4, inner_learning_rate=1.0),
    "atlas": _layer(of.ATLAS, chunk_size=4, window=3, inner_learning_rate=1.0),
    "atlas_polynomial": _layer(of.ATLAS, chunk_size=4, window=2, head_dim=3, polynomial_degree=2, inner_size=5),
    "any_learner": lambda rngs: of.TTT(
        WIDTH,
        2,
        learner=published.ttt((6,), 4),
        conventions=of.Conventions(learned_start=True, skip=True, output_gate=of.OutputGate(rank=3)),
        rngs=rngs,
        **F64,
    ),
    "inplace_ttt": _layer(of.InPlaceTTT, intermediate_size=24, chunk_size=4),
}
