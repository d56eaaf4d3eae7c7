"""Published learners as descriptions, with their equations, sources and differences from public code.

Other parts of a layer (feature maps, convolutions, normalised keys, gates of the output) are defined in the layer.
"""

import jax
import jax.numpy as jnp

from tttlm.ops.ttt.description import Clocks, Gate, Learner, Optimizer, Ridge
from tttlm.ops.ttt.losses import dot, mean_square, square
from tttlm.ops.ttt.models import MLP, DiagonalLinear, Normed, Residual, SwiGLU, gelu
from tttlm.ops.ttt.transforms import LACT, InitialNorm, Muon, one_minus, one_minus_sigmoid


def ttt(
    hidden_sizes: tuple[int, ...] = (),
    mini_batch_size: int = 16,
    *,
    norm: bool = True,
    use_bias: bool = True,
    eps: float = 1e-6,
) -> Learner:
    """TTT-Linear, and TTT-MLP with a hidden size (arXiv 2407.04620, equations 4 to 7 and section 2.7).

    The position scale is that of the released models; the norm's scale and bias are the slow parameters.
    """
    mlp = MLP(hidden_sizes, use_bias=use_bias)
    return Learner(
        model=Residual(Normed(mlp, eps=eps)) if norm else mlp,
        optimizer=Optimizer(position_scale=True),
        clocks=Clocks(anchor=mini_batch_size),
    )


def linear_attention(query_scale: float = 1.0, *, gate: bool = False, per_channel: bool = False) -> Learner:
    """Linear attention; with a gate per head simple GLA (RetNet, Mamba-2), with one per channel GLA (2312.06635).

    The input `g` of the gate is a logarithm: weights are multiplied by `exp(g)`.
    """
    decay = Gate(jnp.exp, per_channel) if gate else None
    optimizer = Optimizer(rate=None, decay=decay, decay_first=gate)
    return Learner(loss=dot, optimizer=optimizer, query_scale=query_scale)


def delta_rule(
    query_scale: float = 1.0, *, gate: bool = False, per_channel: bool = False, writes_per_token: int = 1
) -> Learner:
    """DeltaNet (arXiv 2406.06484), and what gates and more writes per token make of it.

    With a gate per head it is Gated DeltaNet (2412.06464), with one per channel KDA (2510.26692), with several writes
    per token DeltaProduct (2502.10297). The input of the gate is a logarithm; the gradient is taken after the decay.
    """
    decay = Gate(jnp.exp, per_channel) if gate else None
    return Learner(
        optimizer=Optimizer(decay=decay, decay_first=gate),
        clocks=Clocks(writes_per_token=writes_per_token),
        query_scale=query_scale,
    )


def comba(query_scale: float = 1.0) -> Learner:
    """Comba (arXiv 2506.02475): the error is taken at separate keys, before the decay, and written along the keys."""
    return Learner(optimizer=Optimizer(decay=Gate(jnp.exp)), query_scale=query_scale, error_keys=True)


def mesanet() -> Learner:
    """MesaNet (arXiv 2506.05233): the ridge regression over the past, solved at every token."""
    return Learner(optimizer=Ridge(decay=Gate(jnp.exp)))


def longhorn(*, diagonal: bool = False) -> Learner:
    """Longhorn (arXiv 2407.14207): the implicit step, with a rate for every value channel.

    Released models are `diagonal`: of `kᵀk` they use the diagonal only.
    """
    model = DiagonalLinear() if diagonal else MLP()
    return Learner(model=model, optimizer=Optimizer(rate="value", implicit=True))


def titans(hidden_sizes: tuple[int, ...] = (), chunk_size: int = 16) -> Learner:
    """The memory of Titans (arXiv 2501.00663, equations 13, 14, 17, 18): steps with momentum and decay.

    The input of the decay gate is the fraction to forget.
    """
    optimizer = Optimizer(momentum=Gate(), decay=Gate(one_minus))
    return Learner(model=MLP(hidden_sizes), loss=square, optimizer=optimizer, clocks=Clocks(anchor=chunk_size))


def neural_memory(hidden_size: int, chunk_size: int, segment: int | None = None, *, muon: bool = False) -> Learner:
    """The Titans of titans-pytorch: one step a chunk, gates of the mean logit, and a norm whose scale learns too."""
    return Learner(
        model=Residual(Normed(MLP((hidden_size,), activation=gelu), fast_scale=True, eps=1e-5)),
        loss=mean_square,
        optimizer=Optimizer(
            momentum=Gate(jax.nn.sigmoid), decay=Gate(one_minus_sigmoid), transform=Muon(clamp=True) if muon else None
        ),
        clocks=Clocks(anchor=segment, step=chunk_size),
    )


def lact(
    intermediate_size: int, chunk_size: int, *, momentum: bool = False, muon: bool = False, prenorm: bool = False
) -> Learner:
    """LaCT (arXiv 2505.23884): a SwiGLU that makes one step a chunk, which the next chunk reads.

    With `prenorm` unnormalised weights are accumulated, and only those that are read are normalised.
    """
    optimizer = Optimizer(rate="matrix", momentum=Gate() if momentum else None, transform=Muon(LACT) if muon else None)
    return Learner(
        model=SwiGLU(intermediate_size),
        loss=dot,
        optimizer=optimizer,
        clocks=Clocks(anchor=chunk_size, step=chunk_size, visible="after_step"),
        link=InitialNorm(),
        keep_link=not prenorm,
        link_initial=not prenorm,
    )


def inplace_ttt(chunk_size: int, *, taps_ahead: int = 2) -> Learner:
    """In-Place TTT (arXiv 2604.06169): one Hebbian step of the down projection a chunk, which the next reads.

    A target is a convolution that looks `taps_ahead` tokens ahead within the chunk. The loss is linear in it, so that
    a token writes with its own key what is known of its target, and with the keys before it what it adds to theirs.
    """
    return Learner(
        loss=dot,
        clocks=Clocks(anchor=chunk_size, step=chunk_size, visible="after_step", writes_per_token=1 + taps_ahead),
    )


def tnt(
    hidden_sizes: tuple[int, ...],
    global_chunk: int,
    local_chunks: tuple[int, ...],
    local_shards: tuple[int, ...],
    *,
    projection: str = "anchor",
) -> tuple[Learner, ...]:
    """TNT (arXiv 2511.07343, equations 5 to 7 and 13 to 15): a global learner and local ones; their outputs are summed.

    `projection` is over the chunk, as in equations 7 and 15 ("anchor"), or over the shard, as in appendix C ("reset").
    """
    model = MLP(hidden_sizes)
    everywhere = Clocks(anchor=global_chunk, step=global_chunk, visible="after_step")
    local = (
        Learner(model=model, clocks=Clocks(anchor=chunk, reset=shard), query_projection=projection)  # type: ignore[arg-type]
        for chunk, shard in zip(local_chunks, local_shards, strict=True)
    )
    return Learner(model=model, clocks=everywhere), *local


def omega(
    hidden_sizes: tuple[int, ...] = (), window: int = 4, chunk_size: int = 1, *, residual: bool = True
) -> Learner:
    """OmegaNet (arXiv 2505.23735, equations 9 to 16): steps on the weighted losses of the last tokens; `α` decays.

    A memory with hidden layers is `x + MLP(x)`; keys with more features than values need `residual=False`.
    """
    return Learner(
        model=_memory(hidden_sizes, residual),
        loss=square,
        optimizer=Optimizer(decay=Gate(), step_size=True),
        clocks=Clocks(anchor=chunk_size),
        window=window,
    )


def atlas(
    hidden_sizes: tuple[int, ...], window: int, chunk_size: int, *, muon: bool = True, residual: bool = True
) -> Learner:
    """ATLAS (arXiv 2505.23735, equations 32, 33): OmegaNet with momentum and Newton-Schulz at every token."""
    return Learner(
        model=_memory(hidden_sizes, residual),
        loss=square,
        optimizer=Optimizer(momentum=Gate(), decay=Gate(), transform=Muon() if muon else None, step_size=True),
        clocks=Clocks(anchor=chunk_size),
        window=window,
    )


def _memory(hidden_sizes: tuple[int, ...], residual: bool) -> MLP | Residual:
    mlp = MLP(hidden_sizes)
    return Residual(mlp) if hidden_sizes and residual else mlp
