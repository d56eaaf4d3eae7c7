"""A mixer as somebody outside the package would write it: an exponential average of what the tokens say."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tttlm.errors import InputError
from tttlm.mixers import Mixer, register
from tttlm.ops.documents import document_in_progress, documents
from tttlm.parts.partition import FEATURES, FROM_FEATURES, TO_FEATURES, to_heads, to_stream


class AverageState(NamedTuple):
    mean: jax.Array  # [B, D]
    document: jax.Array  # [B]


class Average(nnx.Module):
    """`mean_t = decay mean_{t-1} + (1 - decay) v_t`, `y_t = out_proj(mean_t)`; every channel has a decay."""

    def __init__(self, hidden_size: int, *, decay: float, rngs: nnx.Rngs, **options):
        self.hidden_size = hidden_size
        self.v_proj = nnx.Linear(hidden_size, hidden_size, use_bias=False, rngs=rngs, **options)
        self.out_proj = nnx.Linear(hidden_size, hidden_size, use_bias=False, rngs=rngs, **options)
        self.logit = nnx.Param(jnp.full((hidden_size,), jnp.log(decay / (1 - decay)), options["param_dtype"]))

    def __call__(self, x, segment_ids=None):
        return self.extend(x, self.init_state(x.shape[0]), segment_ids)[0]

    def extend(self, x, state, segment_ids=None):
        docs = None if segment_ids is None else documents(segment_ids, state.document)
        v = to_heads(self.v_proj(x)).astype(jnp.float32)
        decay = jnp.broadcast_to(jax.nn.sigmoid(self.logit[...]).astype(jnp.float32), v.shape)
        v = (1 - decay) * v
        if docs is not None:
            decay = jnp.where(docs.start[..., None], 0, jnp.where(docs.real[..., None], decay, 1))
            v = jnp.where(docs.real[..., None], v, 0)
        v = v.at[:, 0].add(decay[:, 0] * state.mean)
        _, mean = jax.lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, v), axis=1)
        after = AverageState(mean[:, -1], document_in_progress(state.document, docs))
        return self.out_proj(to_stream(mean).astype(x.dtype)), after

    def init_state(self, batch):
        return AverageState(jnp.zeros((batch, self.hidden_size)), jnp.zeros((batch,), jnp.int32))


@dataclass(frozen=True)
class AverageConfig:
    decay: float = 0.5
    """Decay that every channel starts with, between 0 and 1."""


@register("average")
@dataclass(frozen=True)
class AverageMixer(Mixer[AverageConfig]):
    Config: ClassVar[type] = AverageConfig
    parameter_rules = (
        (r"v_proj/kernel$", TO_FEATURES),
        (r"out_proj/kernel$", FROM_FEATURES),
        (r"logit$", FEATURES),
    )

    def check(self):
        if not 0 < self.config.decay < 1:
            raise InputError(f"average: decay must lie between 0 and 1, got {self.config.decay}")

    @property
    def sharded(self):
        return "channels", self.model.hidden_size

    def build(self, *, rngs):
        return Average(self.model.hidden_size, decay=self.config.decay, rngs=rngs, **self.dtypes)

    def flops_per_token(self, sequence_length):
        return 4 * self.model.hidden_size**2
