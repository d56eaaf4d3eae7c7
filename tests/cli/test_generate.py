"""The command line of generation: text as it is made, JSON, a state that is read once; bad input is one line."""

import json

import jax
import pytest
from flax import nnx

from tttlm.cli.generate import main
from tttlm.errors import InputError
from tttlm.interop import save_pretrained
from tttlm.model import LanguageModel, ModelConfig, TTTConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A released model of bytes."""
    config = ModelConfig(
        vocab_size=258,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        intermediate_size=16,
        ttt=TTTConfig(mini_batch_size=4),
    )
    model = nnx.jit(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))()
    nnx.update(model, jax.tree.map(lambda x: x * 4, nnx.state(model, nnx.Param)))
    path = tmp_path_factory.mktemp("model")
    save_pretrained(model, path)
    return path


def test_text_is_printed_as_it_is_made_and_a_state_is_read_once(folder, tmp_path, capsys):
    flags = [str(folder), "--tokenizer", "bytes", "--max_tokens", "12", "--seed", "3", "--ignore_end"]
    assert main([*flags, "--prompt", "The red cat sees"]) == 0
    text = capsys.readouterr().out
    assert main([*flags, "--prompt", "The red cat sees", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    (sample,) = record["samples"]
    assert sample["text"] + "\n" == text
    assert len(sample["tokens"]) == len(sample["log_probs"]) == 12
    assert sample["finish_reason"] == "length"

    state = tmp_path / "state.safetensors"
    (tmp_path / "book.txt").write_text("The red ca")
    read = [*flags[:3], "--prompt_file", str(tmp_path / "book.txt"), "--save_state", str(state)]
    assert main([*read, "--max_tokens", "0"]) == 0
    for _ in range(2):
        assert main([*flags, "--load_state", str(state), "--prompt", "t sees", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["samples"][0]["tokens"] == sample["tokens"]


def test_a_state_is_not_replaced_by_a_generation_that_is_refused(tmp_path):
    config = ModelConfig(vocab_size=258, hidden_size=16, num_layers=1, num_heads=2, mixers=("attention",))
    model = nnx.jit(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))()
    save_pretrained(model, tmp_path / "good")
    first = [str(tmp_path / "good"), "--tokenizer", "bytes", "--prompt", "a", "--save_state", str(tmp_path / "state")]
    assert main([*first, "--max_tokens", "0"]) == 0
    before = (tmp_path / "state").read_bytes()
    for more, words in (
        (("--max_length", "4", "--max_tokens", "9"), "room for 4"),
        (("--stop", ""), "stop strings must be"),
    ):
        with pytest.raises(InputError, match=words):
            main([*first, *more])
        assert (tmp_path / "state").read_bytes() == before
    nnx.update(model, jax.tree.map(lambda x: x * float("nan"), nnx.state(model, nnx.Param)))
    save_pretrained(model, tmp_path / "nan")
    with pytest.raises(InputError, match="outputs are not numbers"):
        main([str(tmp_path / "nan"), *first[1:], "--max_tokens", "0"])
    assert (tmp_path / "state").read_bytes() == before


def test_bad_input_is_refused_in_one_line(folder, tmp_path):
    bad = [
        ([], "name a model"),
        ([str(tmp_path)], "neither the folder of a run .* nor a released model"),
        ([str(folder)], "no tokenizer in"),
        ([str(folder), "--prompt", "a", "--prompt_file", "b"], "give one of them"),
        ([str(folder), "--max_tokens", "0"], "only reads the prompt: name a file with --save_state"),
        ([str(folder), "--save_state", str(tmp_path / "no" / "file")], "cannot be written"),
        ([str(folder), "--save_state", "s", "--max_tokens", "0", "--json"], "json = True is not used with max_tokens"),
        ([str(folder), "--tokenizer", "bytes", "--prompt", "caf\udce9"], r"prompt 1 is not UTF-8 text: 'caf\\udce9'"),
        ([str(folder), "--temperature", "0", "--top_k", "5"], "top_k = 5 is not used with temperature = 0"),
        ([str(folder), "--save_state", str(tmp_path)], "is a folder"),
        ([str(folder), "--load_state", str(tmp_path)], "is not a file: name one of --save_state"),
        ([str(folder), "--tokenizer", "bytes", "--prompt_file", str(tmp_path / "none")], "none is not a file"),
        ([str(folder), "--top_p", "2"], "'top_p' must be"),
        ([str(folder), "--tokenizer", "bytes", "--mesh.tensor", "3"], "does not fit"),
    ]
    for arguments, words in bad:
        with pytest.raises(InputError, match=words) as error:
            main(arguments)
        assert "\n" not in str(error.value)
