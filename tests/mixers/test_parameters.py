"""Public layers say which parameters they take, and take no others."""

import inspect

import pytest
from flax import nnx

from tttlm import layers


@pytest.mark.parametrize("name", [name for name in layers.__all__ if inspect.isclass(getattr(layers, name))])
def test_every_parameter_of_a_layer_is_written_out(name):
    parameters = inspect.signature(getattr(layers, name).__init__).parameters.values()
    assert not [p.name for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


@pytest.mark.parametrize("layer", [layers.TTTLinear, layers.TTTMLP])
def test_a_named_form_builds_no_other_inner_model(layer):
    with pytest.raises(TypeError, match="inner_hidden"):
        layer(64, 4, inner_hidden=(8,), rngs=nnx.Rngs(0))
