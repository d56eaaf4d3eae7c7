"""Every snippet of Python in the pages runs, block after block, with small models where a page names large ones."""

import sys
import types
from dataclasses import replace
from pathlib import Path
from unittest.mock import create_autospec

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tttlm
from tests.docs.pages import PAGES, blocks
from tttlm.adaptation.y_shape import SELF_SUPERVISED_PATH, small_conv_net
from tttlm.data import save_tokenizer
from tttlm.data.tokenizer import ByteTokenizer
from tttlm.mixers import registry
from tttlm.model import LanguageModel, ModelConfig
from tttlm.model import config as model_config

SMALL = ModelConfig(vocab_size=258, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8)
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
SNIPPETS = {name: found for name, text in PAGES.items() if (found := blocks(text, "python"))}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A released model of bytes with its tokenizer, where snippets look for one; presets are of its size."""
    monkeypatch.chdir(tmp_path)
    released = tmp_path / "path" / "to" / "folder"
    model = nnx.jit(lambda: LanguageModel(SMALL, rngs=nnx.Rngs(0)))()
    tttlm.save_pretrained(model, released)
    save_tokenizer(ByteTokenizer(), released)
    monkeypatch.setitem(model_config.PRESETS, "125m", (1, 8, 2, 8))
    return released


def language_model(folder, monkeypatch):
    return {"tokens": jnp.ones((1, 8), jnp.int32)}


def y_shape(folder, monkeypatch):
    small = lambda *, rngs: small_conv_net(features=8, rngs=rngs)
    monkeypatch.setattr("tttlm.adaptation.y_shape.resnet26", small)
    model = small(rngs=nnx.Rngs(0))
    return {"model": model, "which": SELF_SUPERVISED_PATH, "images": IMAGES, "optax": optax, "nnx": nnx}


def texts(folder, monkeypatch):
    tokens = [np.arange(length, dtype=np.int32) % 258 for length in (40, 70)]
    return {"model": tttlm.from_pretrained(folder), "documents": tokens}


def average(folder, monkeypatch):
    from tests.mixers.outside import Average

    monkeypatch.delitem(registry._MIXERS, "average")  # that of the test, by the same name
    package = types.ModuleType("my_package.average")
    package.Average = Average  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_package", types.ModuleType("my_package"))
    monkeypatch.setitem(sys.modules, "my_package.average", package)
    return {}


def hub(folder, monkeypatch):
    """There is no network: the call is held to the signature."""
    load = create_autospec(tttlm.from_pretrained, return_value=tttlm.from_pretrained(folder))
    monkeypatch.setattr(tttlm, "from_pretrained", load, raising=False)
    monkeypatch.setattr(tttlm, "push_to_hub", create_autospec(tttlm.push_to_hub), raising=False)
    return {}


def llama(folder, monkeypatch):
    """A Llama of 32 blocks, as the text says."""
    config = replace(SMALL, mixers=("attention",), num_layers=32)
    tttlm.save_pretrained(nnx.jit(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))(), "llama")
    return {}


def samples(folder, monkeypatch):
    a, b = np.random.default_rng(0).normal(size=(2, 24, 3)).astype(np.float32)
    return {"a": a, "b": b, "images_a": a, "images_b": b, "extract": lambda batch: batch}


# What a snippet takes for granted: names that the text around it explains, by the number of the block.
GIVEN = {
    ("README.md", 2): language_model,
    ("README.md", 3): y_shape,
    ("docs/adaptation.md", 0): y_shape,
    ("docs/adaptation.md", 1): texts,
    ("docs/adding-a-mixer.md", 0): average,
    ("docs/checkpoints.md", 1): hub,
    ("docs/checkpoints.md", 2): llama,
    ("docs/generation.md", 0): lambda folder, monkeypatch: {"folder": folder},
    ("docs/shift.md", 0): samples,
}
# They compile many programs: several layers with gradients, an adapter, dynamic evaluation, a warm start.
SLOW = {"README.md", "docs/adaptation.md", "docs/checkpoints.md", "docs/layers.md", "docs/shift.md"}
ELSEWHERE = {"docs/inner-learner.md"}  # tests/mixers/test_own_learner.py, which also trains it


def test_all_snippets_are_run_somewhere():
    assert {page for page, _ in GIVEN} | ELSEWHERE <= set(SNIPPETS)
    assert set(SNIPPETS) >= {"README.md", "docs/layers.md", "docs/generation.md"}


@pytest.mark.long
@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW)) for p in sorted(set(SNIPPETS) - ELSEWHERE)],
)
def test_the_snippets_of_a_page_run_in_order(page, folder, monkeypatch):
    module = types.ModuleType("snippet")
    monkeypatch.setitem(sys.modules, "snippet", module)  # where dataclasses look for the names of their types
    names = vars(module)
    mixers = dict(registry._MIXERS)
    try:
        for number, block in enumerate(SNIPPETS[page]):
            if (page, number) in GIVEN:
                names |= GIVEN[page, number](folder, monkeypatch)
            exec(compile(block, f"{page}, block {number + 1}", "exec"), names)
        RESULTS.get(page, lambda names: None)(names)
    finally:
        registry._MIXERS.clear()
        registry._MIXERS.update(mixers)


def the_mixer_works(names):
    config = replace(SMALL, mixers=("average",), mixer_options={"average": {"decay": 0.9}})
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    assert model(jnp.ones((1, 4), jnp.int32)).shape == (1, 4, 258)


def the_images_are_classified(names):
    assert names["logits"].shape == (2, 10)


def the_layer_goes_on(names):
    assert names["logits"].shape[0] == 2  # of the images, in the last block
    assert jax.tree.leaves(names["state"])


RESULTS = {
    "README.md": the_layer_goes_on,
    "docs/adaptation.md": the_images_are_classified,
    "docs/adding-a-mixer.md": the_mixer_works,
}
