"""Files and flags are checked by the same rules; what is wrong comes out as one line that names it."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.training.small import small_config
from tttlm.cli.arguments import find_config, parse
from tttlm.errors import InputError
from tttlm.training.config import TrainConfig, check, differences, from_dict, identity, to_dict


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def read(*arguments: str) -> TrainConfig:
    return parse(TrainConfig, arguments, prog="train.py")


def test_flags_win_over_the_file_and_the_file_over_its_base(tmp_path):
    write(tmp_path / "base.yaml", "steps: 10\nmodel: {hidden_size: 32, num_heads: 2, num_layers: 3}\nmesh: {fsdp: 1}\n")
    file = write(tmp_path / "x.yaml", "base: base.yaml\nsteps: 20\nmodel:\n  hidden_size: 64\n  mixers: [ttt_mlp]\n")
    config = read(
        "--config", file, "--model.hidden_size", "128", "--mesh.data=-1", "--data.mixture", "a", "0.5", "b", "2"
    )
    assert (config.steps, config.model.hidden_size, config.model.num_heads, config.model.num_layers) == (20, 128, 2, 3)
    assert config.model.mixers == ("ttt_mlp",)
    assert (config.mesh.data, config.mesh.fsdp) == (-1, 1)
    assert config.data.mixture == {"a": 0.5, "b": 2.0}


def test_of_several_bases_a_later_one_wins_over_an_earlier_and_the_file_over_all(tmp_path):
    write(tmp_path / "size.yaml", "batch_size: 8\nsequence_length: 64\nmodel: {hidden_size: 32, num_heads: 2}\n")
    write(tmp_path / "long.yaml", "batch_size: 2\nsequence_length: 256\nmodel: {num_heads: 4}\n")
    file = write(tmp_path / "x.yaml", "base: [size.yaml, long.yaml]\nbatch_size: 1\n")
    config = read("--config", file)
    assert (config.batch_size, config.sequence_length, config.model.hidden_size, config.model.num_heads) == (
        1,
        256,
        32,
        4,
    )


def test_a_file_that_is_its_own_base_is_one_line(tmp_path):
    write(tmp_path / "x.yaml", "base: y.yaml")
    write(tmp_path / "y.yaml", "base: [x.yaml]")
    with pytest.raises(InputError, match=r"x.yaml: is its own base, through y.yaml"):
        read("--config", str(tmp_path / "x.yaml"))


def test_a_mixture_or_list_takes_the_place_of_that_of_the_base(tmp_path):
    write(tmp_path / "base.yaml", "data: {mixture: {a: 1.0, b: 2.0}}\nmodel: {mixers: [mamba, attention]}\n")
    file = write(tmp_path / "x.yaml", "base: base.yaml\ndata: {mixture: {c: 1}}\nmodel: {mixers: [attention]}\n")
    config = read("--config", file)
    assert config.data.mixture == {"c": 1.0}
    assert config.model.mixers == ("attention",)
    assert read("--config", file, "--data.mixture", "d", "3").data.mixture == {"d": 3.0}


def test_documented_words_are_text_in_a_file_and_numbers_are_numbers(tmp_path):
    text = (
        "distributed: {mode: off}\nmetrics: {tensorboard: on}\noptimizer: {learning_rate: 5e-4}\nschedule: {final: 0}\n"
    )
    config = read("--config", write(tmp_path / "x.yaml", text))
    assert (config.distributed.mode, config.metrics.tensorboard) == ("off", "on")
    assert (config.optimizer.learning_rate, config.schedule.final) == (5e-4, 0.0)


def test_what_is_left_empty_stays_as_it_was(tmp_path):
    write(tmp_path / "base.yaml", "run: mine\nschedule: {warmup_steps: 7, inner_warmup_steps: 8}\n")
    text = "base: base.yaml\nrun:\ninit_from: ~\nmetrics: {wandb: }\nmodel:\nschedule: {warmup_steps: null}\n"
    config = read("--config", write(tmp_path / "x.yaml", text))
    assert (config.run, config.init_from, config.metrics.wandb) == ("mine", "", "")
    assert config.schedule.warmup_steps is None  # a field that may be None
    assert config.schedule.inner_warmup_steps == 8


def test_a_tilde_is_the_home_folder_wherever_a_path_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "x.yaml", "run: ~/a\ndata: {mixture: {~/d: 1.0}}\n")
    config = read("--config", "~/x.yaml", "--init_from", "~/b")
    assert (config.run, config.init_from) == (f"{tmp_path}/a", f"{tmp_path}/b")
    assert config.data.mixture == {f"{tmp_path}/d": 1.0}
    with pytest.raises(InputError, match="'run' must be a path that begins with the home of a known user"):
        read("--run", "~nobody-of-that-name/a")
    with pytest.raises(InputError, match="'run' must be written out"):
        check(small_config("~/a"))


def test_a_misspelt_configuration_of_the_package_is_answered_with_the_name():
    with pytest.raises(InputError, match=r"nor a configuration of that name: did you mean quickstart\?"):
        find_config("quickstrt")


def test_a_configuration_of_the_package_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.yaml", "configs/quickstart.yaml"):
        assert read("--config", name).run == "runs/quickstart"
    assert read("--config", "125m/8k/mamba").sequence_length == 8192
    write(tmp_path / "quickstart.yaml", "run: my-own")
    assert read("--config", "quickstart.yaml").run == "my-own"
    for name in ("../pyproject.toml", "..", "125m", "/quickstart", "x" * 5000):
        with pytest.raises(InputError):
            read("--config", name)


def test_a_flag_may_mend_what_the_file_alone_would_break(tmp_path):
    file = write(tmp_path / "x.yaml", "model: {hidden_size: 30, num_heads: 4}\n")
    assert read("--config", file, "--model.num_heads", "3").model.num_heads == 3


def test_a_saved_configuration_reads_back_the_same(tmp_path):
    config = small_config(**{"schedule.warmup_steps": 3, "model.mixers": ("ttt_mlp",), "data.mixture": {"a": 1.0}})
    saved = yaml.safe_load(yaml.safe_dump(to_dict(config)))
    assert from_dict(TrainConfig, saved) == config
    file = write(tmp_path / "config.yaml", yaml.safe_dump(to_dict(config)))
    assert read("--config", file) == config


@pytest.mark.parametrize(
    ("text", "flags", "says"),
    [
        ("optimiser: {b1: 1}", [], "x.yaml: unknown key 'optimiser' (did you mean 'optimizer'?)"),
        ("model: {hiden_size: 1}", [], "x.yaml: unknown key 'model.hiden_size' (did you mean 'model.hidden_size'?)"),
        ("hidden_size: 1", [], "x.yaml: unknown key 'hidden_size' (did you mean 'model.hidden_size'?)"),
        ("steps: many", [], "x.yaml: 'steps': an integer was expected, got 'many'"),
        ("model: 3", [], "x.yaml: 'model' is a section with keys, got 3"),
        ("- 1", [], "x.yaml: expected 'key: value' lines, got [1]"),
        ("steps: [", [], "x.yaml: not valid YAML at line 1"),
        ("base: none.yaml", [], "none.yaml: cannot be read: No such file or directory"),
        ("base: {a: 1}", [], "x.yaml: 'base' names another YAML file or a list of them, got {'a': 1}"),
        ("model: {hidden_size: 30, num_heads: 4}", [], "heads must divide model.hidden_size"),
        ("steps: 1", ["--stepz", "2"], "train.py: unknown flag '--stepz' (did you mean '--steps'?)"),
        ("steps: 1", ["--confg", "y"], "train.py: unknown flag '--confg' (did you mean '--config'?)"),
        ("steps: 1", ["quickstart"], "Unrecognized options: quickstart (a configuration is named with --config"),
        ("steps: 1", ["--steps", "x"], "train.py: --steps: invalid literal"),
        ("steps: 1", ["--faults.policy", "hope"], "train.py: invalid choice 'hope'"),
        ("steps: 1", ["--steps"], "Missing value for argument '--steps'"),
        ("steps: 1", ["--config", "y.yaml"], "--config is given twice: remove"),
        ("steps: 1\nsteps: 2", [], "x.yaml: line 2: the key 'steps' is a duplicate"),
        ("run: 2024", [], "x.yaml: 'run': text was expected, got 2024"),
        ("steps: 2001-01-01", [], "x.yaml: 'steps': an integer was expected, got '2001-01-01'"),
        ("steps: 9" + "9" * 6000, [], "x.yaml: line 1: a number of 6,001 digits"),
        ("steps: 1", ["--steps", "9" * 6000], "train.py: --steps: Exceeds the limit (4300 digits)"),
        ("steps: 1", ["--model.rope_theta", "nan"], "'model.rope_theta' must be a finite number, got nan"),
        ("steps: 1", ["--model.initializer_range", "-1"], "'model.initializer_range' must be at least 0, got -1.0"),
        ("model: &m {ttt: *m}", [], "x.yaml: line 1: nests deeper than 40 levels"),
        ('base: "a\\0b"', [], "x.yaml: 'base' names another YAML file"),
        ("steps: 1", ["--config"], "--config needs the name of a YAML file"),
    ],
)
def test_bad_input_is_one_line_that_names_it(tmp_path, text, flags, says):
    file = write(tmp_path / "x.yaml", text)
    with pytest.raises(InputError) as caught:
        read("--config", file, *flags)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert "│" not in message


def test_an_error_is_the_same_sentence_where_the_terminal_has_no_utf_8():
    code = "from tttlm.cli.arguments import *; from tttlm.training.config import TrainConfig as T\n"
    code += "try: parse(T, ['--steps', 'x'], prog='train.py')\nexcept InputError as error: print(error)"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "train.py: --steps: invalid literal for int() with base 10: 'x'\n", done.stderr


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schedule.warmup_steps": 13}, "schedule.warmup_steps = 13 does not fit a run of 12 steps"),
        ({"accumulate": 3}, "batch_size = 4 is not divisible by accumulate = 3"),
        ({"batch_size": 2**31 - 1}, "at most 268,435,456 are possible: lower one"),
        ({"loss_chunk": 5}, "sequence_length = 32 is not a multiple of loss_chunk = 5"),
        ({"steps": 0}, "'steps' must be at least 1, got 0"),
        ({"optimizer.b2": 1.0}, "'optimizer.b2' must be less than 1, got 1.0"),
        ({"optimizer.learning_rate": 1e-6}, "schedule.final = 1e-05 is above optimizer.learning_rate = 1e-06"),
        ({"mesh.data": -1}, "only one axis of `mesh` can be -1"),
        ({"mesh.tensor": 0}, "'mesh.tensor' must be at least 1 or -1, got 0"),
        ({"data.path": ""}, "name the data by either data.path"),
        ({"init_from_changes": ("rope_theta",)}, "init_from_changes = ('rope_theta',) is not used without init_from"),
        ({"distributed.mode": "off", "distributed.process": 1}, "distributed.process = 1 is not used with"),
        ({"data.generated.lengths": (9,)}, "generated.lengths = (9,) is not used without data.generated.tasks"),
    ],
)
def test_impossible_combinations_are_refused(changes, says):
    with pytest.raises(InputError, match=says.replace("[", r"\[").replace(")", r"\)").replace("(", r"\(")):
        check(small_config(**changes))


def test_a_run_may_change_what_does_not_change_its_numbers_and_nothing_else():
    config = small_config()
    saved = to_dict(config)
    free = {"mesh.data": 2, "checkpoint.every": 7, "faults.policy": "skip", "metrics.every": 3, "run": "other"}
    assert differences(saved, small_config(**free)) == []
    assert differences(saved, small_config(**{"optimizer.b1": 0.8, "model.hidden_size": 32})) == [
        "model.hidden_size: 16 -> 32",
        "optimizer.b1: 0.9 -> 0.8",
    ]
    assert differences(saved, dataclasses.replace(config, seed=1)) == ["seed: 0 -> 1"]
    assert identity(small_config(**free)) == identity(config) == identity(from_dict(TrainConfig, saved))
    assert identity(small_config(**{"model.rope_theta": 500.0})) != identity(config)
    assert identity(small_config(**{"model.rope_theta": 500})) == identity(small_config(**{"model.rope_theta": 500.0}))
