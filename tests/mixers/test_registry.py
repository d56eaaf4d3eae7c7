"""Every mixer has one place: what the rest of the package knows of it, it asks there."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import tttlm
from tests.mixers import outside
from tests.training.test_meshes import ONE, check, run
from tttlm.errors import InputError
from tttlm.mixers import mixer_names, register, registered
from tttlm.model import LanguageModel, ModelConfig
from tttlm.model.sharding import parameter_axes

SMALL = ModelConfig(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32)
AVERAGE = replace(SMALL, mixers=("average",))


def test_no_mixer_is_named_outside_of_its_place():
    """But for the fields of `ModelConfig`, which are keys of configuration files, and the layouts of checkpoints."""
    rooms = ("model", "training", "evaluation", "comparison", "planning", "parts", "inference", "data")
    names = "|".join(name for name in mixer_names() if registered(name).__module__.startswith("tttlm."))
    quoted = re.compile(rf"""["']({names}|ttt)["']""")
    layers = re.compile(r"\b(TTTLinear|TTTMLP|TTTMixer|Mamba2?|Attention|AttentionMixer|MambaMixer)\b(?!-)")
    for room in rooms:
        for path in (Path(tttlm.__file__).parent / room).rglob("*.py"):
            code = "".join(re.split(r'"""', path.read_text())[::2])
            named = [line for line in code.splitlines() if quoted.search(line) or layers.search(line)]
            allowed = ("mixers: tuple[str, ...]", "backbone: Literal", "def preset(")
            assert not [line for line in named if not line.strip().startswith(allowed)], path


@pytest.mark.long
def test_a_mixer_from_outside_trains_the_same_on_a_mesh_as_on_one_device():
    """Its own rules are followed: no matrix of it is stored whole anywhere, and tokens are exchanged for channels."""
    changes = {
        "import": outside.__name__,
        "model.mixers": ["average"],
        "model.mixer_options": {"average": {"decay": 0.9}},
    }
    check(run(changes, ONE, "fsdp=2,tensor=2,context=2"))


def test_a_mixer_from_outside_is_configured_and_costs_what_it_says():
    quicker = replace(AVERAGE, mixer_options={"average": {"decay": 0.25}})
    assert (AVERAGE.pattern[0].config.decay, quicker.pattern[0].config.decay) == (0.5, 0.25)
    assert hash(AVERAGE) == hash(quicker)
    assert quicker != AVERAGE
    without = replace(AVERAGE, num_layers=1).flops_per_token(8)
    assert AVERAGE.flops_per_token(8) - without == 4 * 16**2 + 6 * 16 * 32
    model = LanguageModel(quicker, rngs=nnx.Rngs(0))
    tokens = jnp.arange(6)[None]
    logits, _ = model.extend(tokens, model.init_state(1))
    assert jnp.allclose(model(tokens), logits, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixers": ("averages",)}, "there is no mixer 'averages'; registered are .*attention, average"),
        ({"mixer_options": {"average": {"decays": 1}}}, r"model.mixer_options.average.decays.*did you mean"),
        ({"mixer_options": {"average": {"decay": "x"}}}, r"model.mixer_options.average.decay"),
        ({"mixer_options": {"average": {"decay": 2.0}}}, "decay must lie between 0 and 1"),
        ({"mixer_options": {"other": {}}}, "'other' is not in model.mixers"),
    ],
)
def test_what_does_not_fit_a_mixer_from_outside_is_refused_in_one_line(changes, words):
    with pytest.raises(InputError, match=words) as error:
        replace(AVERAGE, **changes)
    assert "\n" not in str(error.value)


def test_a_name_is_registered_once():
    assert register("average")(registered("average")) is registered("average")
    with pytest.raises(ValueError, match="'average' is registered already"):
        register("average")(registered("mamba"))


@pytest.mark.parametrize("name", mixer_names())
def test_the_state_of_a_sequence_has_the_bytes_that_the_model_says(name):
    config = replace(SMALL, mixers=(name,), mamba2=replace(SMALL.mamba2, head_dim=8))
    state = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)).init_state(1))
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == config.state_bytes


@pytest.mark.parametrize("name", mixer_names())
def test_every_matrix_of_a_mixer_has_a_rule_of_its_own(name):
    config = replace(SMALL, mixers=(name,), mamba2=replace(SMALL.mamba2, head_dim=8))
    layer = nnx.eval_shape(lambda: config.pattern[0].build(rngs=nnx.Rngs(0)))
    for path, x in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(layer, nnx.Param))):
        if x.ndim > 1:
            inside = jax.tree_util.keystr(path, simple=True, separator="/")
            axes = parameter_axes(config, f"stack/blocks/0/mixer/{inside}", x.ndim)
            assert len(axes) == x.ndim, inside
