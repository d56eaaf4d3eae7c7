"""What a model came with goes out with it: token ids, positions, the tokenizer's files. A run says how it is read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from flax import nnx

import tttlm
from tttlm.errors import InputError
from tttlm.interop.checkpoint import ARCHITECTURES, architecture_for
from tttlm.interop.origin import Origin, kept_values
from tttlm.model import ModelConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def released(tmp_path) -> Path:
    """A released folder with a tokenizer, and with what this library has no use for."""
    folder = Path(shutil.copytree(FIXTURES / "reference" / "qwen3", tmp_path / "released"))
    values = config_of(folder) | {"pretraining_tp": 1, "transformers_version": "5.1.0", "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(values))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text(json.dumps({"file": name}))
    (folder / "README.md").write_text("of that model, and not of what becomes of it")
    return folder


def test_what_came_goes_out(released, tmp_path):
    model = tttlm.from_pretrained(released, param_dtype="bfloat16")
    tttlm.save_pretrained(model, tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(released) | {"torch_dtype": "bfloat16"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (released / name).read_bytes()
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_model_keeps_where_it_came_from_through_transformations_of_nnx(released):
    model = tttlm.from_pretrained(released)
    again = nnx.merge(*nnx.split(model))
    assert again.origin == model.origin
    assert hash(nnx.graphdef(again)) == hash(nnx.graphdef(model))
    assert tttlm.LanguageModel(ModelConfig(hidden_size=8, num_layers=1, num_heads=1), rngs=nnx.Rngs(0)).origin is None


def test_a_model_that_was_changed_says_so_and_keeps_the_rest(released):
    model = tttlm.from_pretrained(released)
    longer = replace(model.config, rope_theta=2e6, attention=replace(model.config.attention, max_length=9000))
    values = kept_values(model.origin, ARCHITECTURES["qwen3"], longer)
    assert (values["rope_theta"], values["max_position_embeddings"], values["eos_token_id"]) == (2e6, 9000, [2, 3])
    assert "rope_parameters" not in values
    assert ARCHITECTURES["qwen3"].config(values).rope_theta == 2e6


def test_token_ids_and_positions_go_to_another_layout():
    config = ModelConfig(hidden_size=8, num_layers=1, num_heads=2, backbone="transformer")
    text = json.dumps({"eos_token_id": 7, "bos_token_id": 5, "max_position_embeddings": 99, "model_type": "ttt"})
    values = kept_values(Origin("gone", "ttt", text), architecture_for(config, layout="official_jax"), config)
    assert (values["eos_token_id"], values["bos_token_id"], values["max_sequence_length"]) == (7, 5, 99)


def test_the_layout_that_a_model_came_in_is_the_one_it_goes_out_in(tmp_path):
    model = tttlm.from_pretrained(FIXTURES / "reference" / "mamba2_ssm", param_dtype="bfloat16")
    tttlm.save_pretrained(model, tmp_path / "out")
    before, after = config_of(FIXTURES / "reference" / "mamba2_ssm"), config_of(tmp_path / "out")
    assert after == before
    assert after["vocab_size"] == 61  # of 64 rows


def test_a_model_whose_folder_is_gone_is_not_written_without_its_tokenizer_in_silence(released, tmp_path):
    model = tttlm.from_pretrained(released)
    shutil.rmtree(released)
    with pytest.raises(InputError, match=r"the tokenizer's files would be copied, is not there: .*model.origin = None"):
        tttlm.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.origin = None
    tttlm.save_pretrained(model, tmp_path / "out")
    assert "eos_token_id" not in config_of(tmp_path / "out")


def test_a_run_says_which_call_reads_it(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(InputError, match=r"is the folder of a run: .*load_run\('.*'\)\.model, or .*tttlm.cli.convert"):
        tttlm.from_pretrained(tmp_path)
