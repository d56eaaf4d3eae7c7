"""A matched model costs what it should, keeps the shape it was given, and says what changed."""

from dataclasses import replace

import pytest

from tttlm.comparison.matching import MatchConfig, cost_of, match
from tttlm.errors import InputError
from tttlm.model import AttentionConfig, Mamba2Config, ModelConfig

BASE = ModelConfig(vocab_size=512, hidden_size=128, num_layers=4, num_heads=4, intermediate_size=256)
TARGET = replace(BASE, mixers=("attention",))
MODELS = {
    "ttt_linear": BASE,
    "ttt_mlp": replace(BASE, mixers=("ttt_mlp",)),
    "mamba": replace(BASE, mixers=("mamba",), num_layers=8, intermediate_size=0),
    "mamba2": replace(
        BASE,
        mixers=("mamba2",),
        num_layers=8,
        intermediate_size=0,
        mamba2=Mamba2Config(head_dim=32, state_size=32, chunk_size=256),
    ),
    "hybrid": replace(
        BASE, mixers=("ttt_linear", "sliding_attention"), attention=AttentionConfig(num_kv_heads=2, sliding_window=64)
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("by", ["parameters", "flops"])
def test_a_match_costs_the_target_and_keeps_widths_of_heads(name, by):
    asked, target = MODELS[name], cost_of(TARGET, by, 256)
    settings = MatchConfig(by=by, to="it", vary=("hidden_size", "intermediate_size"), tolerance=0.03)
    found = match(asked, target, settings, 256, name)
    # What the search interpolates is what the model itself counts.
    assert found.cost == pytest.approx(cost_of(found.config, by, 256), rel=1e-12)
    assert abs(found.cost / target - 1) <= 0.03
    assert found.miss == pytest.approx(found.cost / target - 1)
    assert found.config.hidden_size / found.config.num_heads == asked.hidden_size / asked.num_heads or "ttt" not in name
    assert (found.config.num_layers, found.config.mixers) == (asked.num_layers, asked.mixers)
    assert bool(found.config.intermediate_size) == bool(asked.intermediate_size)
    for field in ("hidden_size", "intermediate_size"):
        said = f"{field} {getattr(asked, field)} -> {getattr(found.config, field)}"
        assert (said in found.changed) == (getattr(asked, field) != getattr(found.config, field))


def test_depth_alone_is_varied_where_that_is_asked():
    asked = replace(BASE, num_layers=2, mixers=("ttt_linear", "attention"))
    target = cost_of(replace(asked, num_layers=6), "parameters", 256)
    found = match(asked, target, MatchConfig(by="parameters", vary=("num_layers",), tolerance=0.0), 256, "it")
    assert (found.config, found.changed) == (replace(asked, num_layers=6), "num_layers 2 -> 6")


def test_a_model_within_the_tolerance_stays_as_it_is():
    target = cost_of(BASE, "flops", 256) * 1.015
    found = match(BASE, target, MatchConfig(by="flops", vary=("hidden_size", "num_layers"), tolerance=0.02), 256, "it")
    assert (found.config, found.changed) == (BASE, "")


def test_what_cannot_be_matched_is_refused_with_the_nearest():
    target = cost_of(BASE, "parameters", 256) * 1.1
    with pytest.raises(
        InputError, match=r"models\.it: no num_layers gives .* to within 1\.0%: the nearest has .*\(-"
    ) as e:
        match(BASE, target, MatchConfig(by="parameters", vary=("num_layers",), tolerance=0.01), 256, "it")
    assert "\n" not in str(e.value)
