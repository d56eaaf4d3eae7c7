"""Every example runs, and what it trains gets better."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer
from tokenizers.models import BPE

import tttlm
from tttlm.data import load_tokenizer
from tttlm.model import LanguageModel, ModelConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "transformer": {"steps": 12, "hidden_size": 16, "num_layers": 1},
    "linen_transformer": {"steps": 12, "hidden_size": 16, "num_layers": 1},
    "forecast": {"steps": 12, "time": 16, "hidden_size": 16},
    "digits": {"steps": 12, "hidden_size": 16},
    "hybrid": {"steps": 60, "hidden_size": 16},
    "finetune": {"steps": 12, "batch": 2, "time": 24, "rate": 0.01},
}
ALWAYS = ("forecast", "finetune")  # the others compile more, and are slow tests


def test_every_example_is_run_and_short_enough_to_read_in_a_minute():
    programs = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert set(programs) == set(SMALL)
    assert max(len(text.splitlines()) for text in programs.values()) < 70


@pytest.fixture
def folders(tmp_path):
    """A released folder with its tokenizer, a text, and the name of a folder for the result."""
    text = "To be, or not to be, that is the question. "
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    small = ModelConfig(vocab_size=len(letters), hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16)
    model = nnx.jit(lambda: LanguageModel(small, rngs=nnx.Rngs(0)))()
    tttlm.save_pretrained(model, tmp_path / "released")
    Tokenizer(BPE(letters, [])).save(str(tmp_path / "released" / "tokenizer.json"))
    (tmp_path / "text").write_text(4 * text)
    return tuple(str(tmp_path / name) for name in ("released", "text", "finetuned"))


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in SMALL]
)
def test_an_example_learns(name, request):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folders = request.getfixturevalue("folders") if name == "finetune" else ()
    losses = module.main(*folders, **SMALL[name])
    assert len(losses) == SMALL[name]["steps"]
    assert sum(losses[-3:]) < sum(losses[:3])
    if name == "finetune":
        released, _, finetuned = folders
        before, after = (tttlm.from_pretrained(folder).embed.embedding[...] for folder in (released, finetuned))
        assert 0 < np.max(np.abs(after - before)) < 1
        assert load_tokenizer(finetuned).fingerprint == load_tokenizer(released).fingerprint
