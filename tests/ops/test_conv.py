"""The causal convolution is its sum over taps, gradients included, within and across documents."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from tttlm.ops.conv import causal_conv
from tttlm.ops.documents import documents


def by_definition(x, kernel, bias, segment_ids):
    """`y_t = bias + sum_w kernel[W-1-w] x_{t-w}`, token by token, over tokens `t-w` of the document of token `t`."""
    rows = []
    for row, ids in zip(x, segment_ids, strict=True):
        y = []
        for t in range(len(row)):
            total = bias
            for w in range(min(len(kernel), t + 1)):
                if ids[t] and all(ids[t - w : t + 1] == ids[t]):
                    total = total + kernel[-1 - w] * row[t - w]
            y.append(total)
        rows.append(jnp.stack(y))
    return jnp.stack(rows)


@pytest.mark.long
@pytest.mark.usefixtures("x64")
@given(time=st.integers(1, 9), width=st.integers(1, 4), seed=st.integers(0, 99), packed=st.booleans())
def test_outputs_and_gradients_are_those_of_the_definition(time, width, seed, packed):
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(1, 4, (2, time))) if packed else np.ones((2, time), int)
    shapes = (2, time, 3), (width, 3), (3,), (2, time, 3)
    x, kernel, bias, weights = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)

    def ours(x, kernel, bias):
        docs = documents(jnp.asarray(ids, jnp.int32), jnp.zeros(2, jnp.int32)) if packed else None
        return jnp.sum(weights * causal_conv(x, kernel, bias, docs=docs)[0])

    def expected(x, kernel, bias):
        return jnp.sum(weights * by_definition(x, kernel, bias, ids))

    got = jax.value_and_grad(ours, (0, 1, 2))(x, kernel, bias)
    want = jax.value_and_grad(expected, (0, 1, 2))(x, kernel, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, want)
