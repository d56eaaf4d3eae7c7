"""The statistics of the inner model against the definition: `jax.grad` and the loss of every token."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttlm.ops.ttt import InnerLayer, InnerNorm, LearnerInputs, learner_statistics, published
from tttlm.ops.ttt.models import MLP

B, N, M, H, K = 2, 6, 4, 2, 4


def make(depth: int, biases: bool = True):
    rng = np.random.default_rng(depth)
    widths = [K, *[6] * (depth - 1), K]
    weights = tuple(
        InnerLayer(jnp.array(rng.normal(size=(H, i, o)) / 2), jnp.array(rng.normal(size=(H, o))) if biases else None)
        for i, o in pairwise(widths)
    )
    k, v = (jnp.array(rng.normal(size=(B, N * M, H, K))) for _ in range(2))
    norm = InnerNorm(jnp.array(rng.normal(size=(H, K))), jnp.array(rng.normal(size=(H, K))))
    rates = jnp.array(rng.uniform(0.05, 0.2, (B, N * M, H)))
    return k, v, rates, jnp.array(rng.uniform(0.2, 1.0, M)), weights, norm


def inner_statistics(k, v, rates, token_scale, weights, norm, **options):
    hidden = tuple(layer.kernel.shape[-1] for layer in weights[:-1])
    learner = published.ttt(hidden, M, norm=norm is not None, use_bias=weights[0].bias is not None)
    inputs = LearnerInputs(k, k, v, rates)
    return learner_statistics(learner, inputs, weights, slow=norm, position_scale=token_scale, **options)


@jax.jit
def loss(weights, k, v, norm):
    z = MLP()(weights, None, k)
    if norm is not None:
        z = k + norm.scale * (z - z.mean()) / jnp.sqrt(z.var() + 1e-6) + norm.bias
    return 0.5 * jnp.sum((z - v) ** 2)


gradient_of = jax.jit(jax.grad(loss))


def distance(a, b):
    return np.sqrt(sum(float(jnp.sum((x - y) ** 2)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)))


def defined(k, v, rates, token_scale, weights, norm):
    """The same by the definition, for every head of every row."""
    before, after, norms, drifts = [], [], [], []
    for row in range(k.shape[0]):
        for head in range(H):
            initial = jax.tree.map(lambda w, head=head: w[head], weights)
            n = None if norm is None else jax.tree.map(lambda w, head=head: w[head], norm)
            current, drift = initial, []
            for start in range(0, k.shape[1], M):
                tokens = range(start, start + M)
                of = [(k[row, t, head], v[row, t, head]) for t in tokens]
                before += [float(loss(current, *kv, n)) for kv in of]
                for t, gradient in zip(tokens, [gradient_of(current, *kv, n) for kv in of], strict=True):
                    step = token_scale[-1] * rates[row, t, head]
                    current = jax.tree.map(lambda w, g, step=step: w - step * g, current, gradient)
                after += [float(loss(current, *kv, n)) for kv in of]
                drift.append(distance(current, initial))
            drifts.append(drift)
            norms.append(distance(current, jax.tree.map(jnp.zeros_like, current)))
    drift = np.mean(drifts, axis=0)
    quarters = [drift[int(np.ceil(len(drift) * q / 4)) - 1] for q in (1, 2, 3, 4)]
    return np.mean(before), np.mean(after), float(jnp.mean(rates) * token_scale[-1]), np.mean(norms), quarters


@pytest.mark.parametrize(("depth", "normed", "biases"), [(1, True, True), (2, True, True), (1, False, False)])
def test_statistics_are_those_of_the_definition(x64, depth, normed, biases):
    k, v, rates, token_scale, weights, norm = make(depth, biases)
    norm = norm if normed else None
    found = inner_statistics(k, v, rates, token_scale, weights, norm)
    for name, a, b in zip(found._fields, found, defined(k, v, rates, token_scale, weights, norm), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, err_msg=name)


@pytest.mark.long
def test_a_document_counts_as_it_does_alone_and_padding_does_not_count(x64):
    k, v, rates, token_scale, weights, norm = make(1)
    cut, end = 2 * M, 5 * M - 1  # the second document ends within its last mini-batch, then comes padding
    segments = jnp.zeros((B, N * M), jnp.int32).at[:, :cut].set(1).at[:, cut:end].set(2)
    packed = inner_statistics(k, v, rates, token_scale, weights, norm, segment_ids=segments)
    alone = []
    for a, b in ((0, cut), (cut, N * M)):
        part = [x[:, a:b] for x in (k, v, rates)]
        alone.append(inner_statistics(*part, token_scale, weights, norm, segment_ids=segments[:, a:b]))
    shares = np.array([cut, end - cut]) / end
    for name in ("loss_before", "loss_after", "learning_rate"):
        np.testing.assert_allclose(
            getattr(packed, name), shares @ [getattr(part, name) for part in alone], rtol=1e-12, err_msg=name
        )
    np.testing.assert_allclose(packed.drift[-1], alone[1].drift[-1], rtol=1e-12)
    np.testing.assert_allclose(packed.weight_norm, alone[1].weight_norm, rtol=1e-12)
    whole = inner_statistics(k, v, rates, token_scale, weights, norm)
    assert abs(whole.drift[-1] - packed.drift[-1]) > 1e-3
