"""Released families beside what `transformers` computes: from fixtures, and with `transformers` itself where asked."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import tttlm
from tttlm.errors import InputError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "reference"
FOLDERS = ["llama3", "smollm", "qwen2", "qwen3", "mamba", "mamba2", "mamba_ssm", "mamba2_ssm"]


def logits_of(folder: Path, tokens) -> np.ndarray:
    return np.asarray(tttlm.from_pretrained(folder, param_dtype="float64")(jnp.asarray(tokens, jnp.int32)))


@pytest.mark.parametrize("name", [name for name in FOLDERS if name not in ("mamba", "mamba2")])  # see *_ssm
@pytest.mark.usefixtures("x64")
def test_logits_agree_with_transformers_and_the_folder_goes_out_as_it_came(tmp_path, name):
    folder = FIXTURES / name
    expected = load_file(folder / "expected.safetensors")
    scale = np.abs(expected["logits"]).max()
    rounding = 3e-7 if "mamba" in name else 3e-6  # `transformers` takes the angles of rotary embeddings in float32
    logits = logits_of(folder, expected["input_ids"])
    np.testing.assert_allclose(logits, expected["logits"], rtol=rounding, atol=rounding * scale)
    model = tttlm.from_pretrained(folder, param_dtype="bfloat16")
    layout = "mamba_ssm" if name.endswith("_ssm") else None
    tttlm.save_pretrained(model, tmp_path / "out", layout=layout)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(before) - {"lm_head.weight"} == set(after) - {"lm_head.weight"}
    for key in after:
        np.testing.assert_array_equal(before[key], after[key], err_msg=key)
    assert tttlm.from_pretrained(tmp_path / "out", param_dtype="bfloat16").config == model.config


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_both_layouts_of_mamba_turn_into_each_other(tmp_path, name):
    ours, theirs = FIXTURES / name, FIXTURES / f"{name}_ssm"
    for folder, layout, target in ((ours, "mamba_ssm", theirs), (theirs, "huggingface", ours)):
        tttlm.save_pretrained(tttlm.from_pretrained(folder, param_dtype="bfloat16"), tmp_path / layout, layout=layout)
        written, wanted = load_file(tmp_path / layout / "model.safetensors"), load_file(target / "model.safetensors")
        wanted.pop("lm_head.weight", None)  # a copy of the embedding
        assert set(written) == set(wanted)
        for key in written:
            np.testing.assert_array_equal(written[key], wanted[key], err_msg=key)
        config = json.loads((tmp_path / layout / "config.json").read_text())
        assert ("ssm_cfg" in config) == (layout == "mamba_ssm")
    with pytest.raises(InputError, match="unknown layout 'torch'; there are huggingface, "):
        tttlm.save_pretrained(tttlm.from_pretrained(ours), tmp_path / "torch", layout="torch")
    with pytest.raises(InputError, match="layout mamba_ssm has no model of mixers"):
        tttlm.save_pretrained(tttlm.from_pretrained(FIXTURES / "qwen3"), tmp_path / "torch", layout="mamba_ssm")


def changed(folder: Path, name: str, changes: dict, change_tensors=lambda tensors: tensors) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir()
    values = json.loads((FIXTURES / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    save_file(change_tensors(load_file(FIXTURES / name / "model.safetensors")), folder / "model.safetensors")
    return folder


REFUSED = {
    "qwen2": [
        ({"use_sliding_window": True}, "use_sliding_window must be False, got True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must all be 'full_attention'"),
    ],
    "llama3": [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' has no 'low_freq_factor'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 1}},
            "low_freq_factor must be less than high_freq_factor, got 4.0 and 1.0",
        ),
    ],
    "mamba_ssm": [
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer must be 'Mamba1' or 'Mamba2', got 'Mamba3'"),
        ({"ssm_cfg": {"d_state": 8, "heads": 3}}, "ssm_cfg.heads is not supported for a Mamba1 layer, got 3"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx is not supported, got \[1\]"),
        ({"d_intermediate": 64}, "d_intermediate is not supported, got 64"),
        ({"rms_norm": False}, "rms_norm must be True, got False"),
        ({"pad_vocab_size_multiple": 1}, r"has shape \[64, 32\] of bfloat16, but config.json asks for \[61, 32\]"),
    ],
    "mamba2_ssm": [
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate must be False, got True"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 48}}, "d_ssm must be 64, got 48"),
    ],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_these_families_can_say_and_is_not_computed_here_is_refused(tmp_path, name):
    for number, (changes, message) in enumerate(REFUSED[name]):
        with pytest.raises(InputError, match=message) as error:
            tttlm.from_pretrained(changed(tmp_path / str(number), name, changes))
        assert "\n" not in str(error.value)


def test_a_tied_embedding_may_be_stored_under_the_name_of_the_head_alone(tmp_path):
    def renamed(tensors):
        tensors["lm_head.weight"] = tensors.pop("backbone.embedding.weight")
        return tensors

    model = tttlm.from_pretrained(changed(tmp_path / "model", "mamba_ssm", {}, renamed))
    whole = tttlm.from_pretrained(FIXTURES / "mamba_ssm")
    np.testing.assert_array_equal(model.embed.embedding[...], whole.embed.embedding[...])


def test_groups_of_a_mamba2_of_the_authors_are_those_of_its_norm(tmp_path):
    def grouped(tensors):
        for key in [key for key in tensors if "in_proj" in key or "conv1d" in key]:
            state = tensors[key][-20:-4] if "in_proj" in key else tensors[key][-16:]  # B and C
            rest = tensors[key][-4:] if "in_proj" in key else tensors[key][:0]
            end = -20 if "in_proj" in key else -16
            tensors[key] = np.concatenate([tensors[key][:end], state, state, rest])
        return tensors

    ssm = {"layer": "Mamba2", "d_state": 8, "headdim": 16, "ngroups": 2}
    model = tttlm.from_pretrained(changed(tmp_path / "model", "mamba2_ssm", {"ssm_cfg": ssm}, grouped))
    assert (model.config.mamba2.num_groups, model.config.mamba2.norm_groups) == (2, 2)
    tttlm.save_pretrained(model, tmp_path / "out", layout="mamba_ssm")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["ssm_cfg"]["ngroups"] == 2
    with pytest.raises(InputError, match="norm_groups = 2"):
        tttlm.save_pretrained(model, tmp_path / "other", layout="huggingface")


@pytest.mark.reference
@pytest.mark.parametrize("name", FOLDERS)
def test_transformers_reads_what_is_written_and_computes_the_same(tmp_path, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = tttlm.from_pretrained(FIXTURES / name)
    tttlm.save_pretrained(model, tmp_path / "out", layout="huggingface")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    expected = load_file(FIXTURES / name / "expected.safetensors")
    with torch.no_grad():
        logits = theirs(torch.from_numpy(expected["input_ids"])).logits.numpy()
    scale = np.abs(expected["logits"]).max()
    np.testing.assert_allclose(logits, expected["logits"], rtol=1e-6, atol=1e-6 * scale)
