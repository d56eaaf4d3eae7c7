"""Small learners of every kind, and random inputs for any description."""

import jax
import jax.numpy as jnp
import numpy as np

from tttlm.ops.ttt import Clocks, Gate, Learner, LearnerInputs, Optimizer, Ridge, published
from tttlm.ops.ttt.losses import Huber, PowerLoss
from tttlm.ops.ttt.models import MLP, Normed, Residual, RidgeWeights, SwiGLU
from tttlm.ops.ttt.state import InnerNorm
from tttlm.ops.ttt.transforms import ClipNorm, QNormalized, factor, one_minus, softmax_link

B, T, H, K = 2, 20, 2, 4
M = 4  # tokens of a chunk

_tnt = published.tnt((6,), M, (M,), (2 * M,), projection="reset")
LEARNERS = {
    "ttt_linear": published.ttt((), M),
    "ttt_mlp": published.ttt((6,), M),
    "linear_attention": published.linear_attention(),
    "simple_gla": published.linear_attention(0.5, gate=True),
    "gla": published.linear_attention(0.5, gate=True, per_channel=True),
    "deltanet": published.delta_rule(),
    "gated_deltanet": published.delta_rule(gate=True),
    "kda": published.delta_rule(0.5, gate=True, per_channel=True),
    "deltaproduct": published.delta_rule(writes_per_token=2),
    "gated_deltaproduct": published.delta_rule(gate=True, writes_per_token=2),
    "comba": published.comba(0.5),
    "mesanet": published.mesanet(),
    "longhorn": published.longhorn(),
    "longhorn_diagonal": published.longhorn(diagonal=True),
    "titans_linear": published.titans((), M),
    "titans_mlp": published.titans((6,), M),
    "titans_pytorch": published.neural_memory(6, M),
    "titans_pytorch_segments": published.neural_memory(6, M, 2 * M),
    "titans_pytorch_muon": published.neural_memory(6, M, muon=True),
    "lact_momentum": published.lact(6, M, momentum=True),
    "lact_muon": published.lact(6, M, muon=True),
    "lact_prenorm": published.lact(6, M, momentum=True, muon=True, prenorm=True),
    "inplace_ttt": published.inplace_ttt(M),
    "tnt_global": _tnt[0],
    "tnt_local": _tnt[1],
    "tnt_local_chunk": published.tnt((), M, (M,), (2 * M,))[1],
    "omeganet": published.omega((), 3, 1),
    "omeganet_chunk": published.omega((6,), 6, M),
    "atlas": published.atlas((6,), 3, M),
    # Of no paper: parts that none of the above joins.
    "moneta": Learner(
        model=Residual(MLP((6,))),
        loss=PowerLoss(3.0),
        optimizer=Optimizer(decay=Gate()),
        clocks=Clocks(anchor=M, visible="after_step"),
        link=QNormalized(4.0),
    ),
    "memora": Learner(
        loss=Huber(0.5), optimizer=Optimizer(rate="value", decay=Gate()), link=softmax_link, clocks=Clocks(anchor=M)
    ),
    "clipped_swiglu": Learner(
        model=Residual(Normed(SwiGLU(6))),
        optimizer=Optimizer(transform=ClipNorm(0.05), momentum=Gate(jax.nn.sigmoid)),
        clocks=Clocks(anchor=2 * M, step=M, reset=4 * M),
        window=3,
    ),
    "constant_anchor": Learner(optimizer=Optimizer(decay=Gate(per_channel=False)), clocks=Clocks(anchor=None)),
    "scan_mlp": Learner(model=MLP((6,), use_bias=True), optimizer=Optimizer(momentum=Gate(), decay=Gate())),
}


def make(learner: Learner, seed: int = 0, batch: int = B, time: int = T, dtype=np.float64):
    """Random arguments of `learn`: inputs, weights, and the keyword arguments that the learner needs."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    uniform = lambda low, high, *shape: jnp.asarray(rng.uniform(low, high, size=shape), dtype)
    written = time * learner.clocks.writes_per_token
    optimizer = learner.optimizer

    def gate(one):
        if one is None:
            return None
        shape = (batch, time, H, K) if one.per_channel else (batch, time, H)
        ranges = {factor: (0.6, 1.0), one_minus: (0.0, 0.3), jnp.exp: (-0.5, 0.0)}
        return uniform(*ranges.get(one.activation, (-1.0, 2.0)), *shape)

    if isinstance(optimizer, Ridge):
        root = normal(H, K, K)
        weights = RidgeWeights(root @ root.mT, normal(H, K, K))
    else:
        weights = jax.tree.map(
            lambda w: w.astype(dtype) + 0.3 * normal(*w.shape), learner.model.init(jax.random.key(seed), H, K, K)
        )
    rates = uniform(0.05, 0.3, batch, written, H)
    rate = getattr(optimizer, "rate", "token")
    if rate is None:
        rates = None
    elif rate == "value":
        rates = uniform(0.05, 0.5, batch, written, H, K)
    elif rate == "matrix":
        rates = jax.tree.map(lambda _: uniform(0.05, 0.3, batch, written, H), weights)
    elif learner.window > 1:
        rates = uniform(0.05, 0.3, batch, time, H, learner.window)
    unit = lambda a: a / jnp.linalg.norm(a, axis=-1, keepdims=True)
    inputs = LearnerInputs(
        queries=normal(batch, time, H, K),
        keys=unit(normal(batch, written, H, K)),
        values=normal(batch, written, H, K),
        rates=rates,
        momentum=gate(getattr(optimizer, "momentum", None)),
        decay=gate(optimizer.decay),
        step_size=uniform(0.1, 1.0, batch, time, H) if getattr(optimizer, "step_size", False) else None,
        error_keys=unit(normal(batch, written, H, K)) if learner.error_keys else None,
    )
    options = {"slow": None, "position_scale": None}
    if isinstance(optimizer, Ridge):
        options["slow"] = uniform(0.5, 1.0, H, K)
    elif isinstance(norm := getattr(learner.model, "inner", None), Normed) and not norm.fast_scale:
        options["slow"] = InnerNorm(1 + 0.2 * normal(H, K), 0.2 * normal(H, K))
    if getattr(optimizer, "position_scale", False):
        options["position_scale"] = uniform(0.2, 1.0, learner.clocks.anchor)
    return inputs, weights, options


def piece(learner: Learner, inputs: LearnerInputs, start: int, end: int) -> LearnerInputs:
    """The tokens `start..end-1`, with all their writes."""
    n = learner.clocks.writes_per_token
    many = {"keys", "values", "rates", "error_keys"}
    cut = lambda name: lambda a: a[:, start * n : end * n] if name in many else a[:, start:end]
    return LearnerInputs(**{name: jax.tree.map(cut(name), a) for name, a in inputs._asdict().items()})
