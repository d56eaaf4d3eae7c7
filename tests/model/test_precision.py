"""float64 is float64 or refused, never float32 without a word."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import tttlm
from tests.training.small import small_config
from tttlm.errors import InputError
from tttlm.training.config import check

SIZES = {"vocab_size": 11, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 8}


@pytest.mark.parametrize("field", ["dtype", "param_dtype"])
def test_float64_without_x64_is_refused_in_one_line(field):
    config = tttlm.ModelConfig(**SIZES, **{field: "float64"})
    for make in (
        lambda: tttlm.LanguageModel(config, rngs=nnx.Rngs(0)),
        lambda: check(small_config(**{f"model.{field}": "float64"})),
    ):
        with pytest.raises(InputError, match=rf"model.{field} is float64.*JAX_ENABLE_X64=1") as caught:
            make()
        assert "\n" not in str(caught.value)


def test_float64_with_x64_is_float64(x64):
    config = tttlm.ModelConfig(**SIZES, dtype="float64", param_dtype="float64")
    check(small_config(**{"model.dtype": "float64", "model.param_dtype": "float64"}))
    model = tttlm.LanguageModel(config, rngs=nnx.Rngs(0))
    assert {x.dtype.name for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {"float64"}
    assert model(jnp.zeros((1, 4), jnp.int32)).dtype == jnp.float64
