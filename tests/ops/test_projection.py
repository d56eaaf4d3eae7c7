"""The projection is the product of matrices, and so are its gradients, whatever axes are merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from tttlm.ops.projection import projection


@pytest.mark.long
@pytest.mark.usefixtures("x64")
@given(rows=st.sampled_from([(3,), (2, 5), (2, 3, 4)]), inputs=st.integers(1, 4), outputs=st.integers(1, 4))
def test_gradients_are_those_of_the_product(rows, inputs, outputs):
    rng = np.random.default_rng(0)
    x, kernel, bias, weights = (
        jnp.asarray(rng.normal(size=shape))
        for shape in ((*rows, inputs), (inputs, outputs), (outputs,), (*rows, outputs))
    )
    graph, _ = nnx.split(nnx.Linear(inputs, outputs, dot_general=projection, rngs=nnx.Rngs(0)))

    def ours(x, kernel, bias):
        layer = nnx.merge(graph, nnx.State({"kernel": nnx.Param(kernel), "bias": nnx.Param(bias)}))
        return jnp.sum(weights * layer(x))

    def expected(x, kernel, bias):
        return jnp.sum(weights * (x @ kernel + bias))

    got, want = (jax.value_and_grad(f, (0, 1, 2))(x, kernel, bias) for f in (ours, expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, want)
