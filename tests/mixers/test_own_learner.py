"""The learner that docs/inner-learner.md has a reader write: cut anywhere it is the definition; it trains, decodes."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.ops.learners import T, make
from tests.ops.test_conformance import close, everything
from tttlm.model import LanguageModel, ModelConfig

DOC = Path(__file__).parents[2] / "docs" / "inner-learner.md"


@pytest.fixture(scope="module")
def own():
    """What the example defines."""
    (code,) = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert len(code.splitlines()) < 45
    names: dict = {"__name__": "log_cosh"}
    exec(compile(code, str(DOC), "exec"), names)
    return names


@pytest.mark.long
def test_the_example_passes_the_conformance_of_every_learner(own, x64):
    learner, _ = own["LogCosh"].recipe(own["ChunkedConfig"](chunk_size=4), 3, 4)
    args = make(learner)
    found = everything(learner, "chunked", (10, T), args, False)
    expected = everything(learner, "reference", (T,), args, False)
    close(found, expected)


@pytest.mark.long
def test_the_example_trains_and_decodes(own):
    config = ModelConfig(
        vocab_size=13,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        intermediate_size=24,
        mixers=("log_cosh",),
        mixer_options={"log_cosh": {"chunk_size": 4}},
        remat="none",
    )
    graph, parameters = nnx.split(nnx.jit(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))())
    tokens = jnp.asarray(np.random.default_rng(0).integers(13, size=(2, 5)))
    tokens = jnp.concatenate([tokens, tokens], axis=1)  # what is learned within a sequence helps
    optimizer = optax.adam(0.03)

    def loss(parameters):
        logits = nnx.merge(graph, parameters)(tokens)[:, :-1]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    @jax.jit
    def train(parameters):
        def step(carry, _):
            parameters, state = carry
            value, gradient = jax.value_and_grad(loss)(parameters)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(parameters, updates), state), value

        return jax.lax.scan(step, (parameters, optimizer.init(parameters)), length=8)

    @jax.jit
    def decode(parameters):
        model = nnx.merge(graph, parameters)
        step = lambda state, token: model.extend(token[:, None], state)[::-1]
        _, logits = jax.lax.scan(step, model.init_state(2), tokens.T)
        return logits[:, :, 0].swapaxes(0, 1), model(tokens)

    (parameters, _), losses = train(parameters)
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(*decode(parameters), rtol=1e-4, atol=1e-4)
