"""The commands in the pages run, with small texts, models and runs under the names that the pages use.

`ELSEWHERE` has those that are not run here, and why; tests/docs/test_pages.py parses all of them.
"""

import importlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from flax import nnx

import tttlm
from tests.docs.pages import ROOT
from tests.docs.test_pages import COMMANDS, words_of
from tests.training.small import write_texts
from tttlm.model import LanguageModel, ModelConfig, TTTConfig

FIXTURES = ROOT / "tests" / "fixtures"
SMALL = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    intermediate_size=16,
    backbone="transformer",
    ttt=TTTConfig(mini_batch_size=4),
)
# What makes a command small; the last of two flags counts.
SIZES = {
    "train": {
        "data.prepare.source": "texts",
        "data.prepare.tokenizer": "bytes",
        "data.prepare.held_out": "0.25",
        "data.prepare.workers": "1",
        "model.vocab_size": "300",
        "model.hidden_size": "16",
        "model.num_layers": "2",
        "model.num_heads": "2",
        "model.intermediate_size": "16",
        "steps": "4",
        "batch_size": "4",
        "sequence_length": "32",
        "loss_chunk": "0",
        "schedule.warmup_steps": "1",
        "evaluate.every": "2",
        "evaluate.batches": "1",
        "checkpoint.every": "2",
        "metrics.tensorboard": "off",
        "distributed.mode": "off",
    },
    "eval": {
        "positions.windows": "16",
        "positions.reset_every": "16",
        "recall.tasks": "copy",
        "recall.lengths": "33",
        "recall.samples": "2",
    },
    "generate": {"max_tokens": "4"},
    "shift": {"permutations": "19", "pairs": "40"},
}
# Part of a command, and why it is not run here.
ELSEWHERE = {
    "--plan": "compiles for a TPU or GPU, with libraries of the extra `plan`: tests/planning",
    "--distributed": "needs several processes: tests/training/test_cluster.py",
    "configs/prepare/fineweb_edu.yaml": "downloads text: tests/data/test_reading.py reads local files of the kind",
    "configs/compare": "trains for minutes: tests/cli/test_compare.py",
    "configs/adapt": "trains for minutes: tests/adaptation/test_experiment.py",
    "--tyro-write-completion": "writes a file: tests/docs/test_pages.py runs it",
    "runs/compare-": "needs the runs of a comparison that trains for minutes: tests/cli/test_compare.py",
}
QUICK = ("inspect data/books", "--check data/books", "'books/**/*.txt'")  # the others are slow tests


def why_not(line: str) -> str:
    return next((reason for part, reason in ELSEWHERE.items() if part in line), "")


def marks(program: str, line: str) -> list[pytest.MarkDecorator]:
    return [] if any(part in line for part in QUICK) else [pytest.mark.slow]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Texts, a tokenizer, arrays and pictures, under the names of the pages."""
    world = tmp_path_factory.mktemp("texts")
    (world / "configs").symlink_to(ROOT / "configs")
    for name in ("texts", "novels/train", "novels/test", "code", "books/a", "NOVELS", "data/raw"):
        write_texts(world / name)
    for name in ("book.txt", "FILE"):
        shutil.copy(world / "texts" / "00.txt", world / name)
    sentencepiece.SentencePieceTrainer.train(
        input=[str(path) for path in sorted((world / "texts").iterdir())],
        model_prefix=str(world / "tokenizer"),
        vocab_size=280,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    rng = np.random.default_rng(0)
    for side in ("a", "b"):
        np.save(world / f"{side}.npy", rng.normal(size=(40, 3)))
    for side in ("clean", "corrupted"):
        (world / side).mkdir()
        for i in range(24):
            np.save(world / side / f"{i}.npy", rng.normal(size=(4, 4, 1)))
    return world


@pytest.fixture(scope="module")
def models(texts, tmp_path_factory) -> Path:
    """The same with runs and released models."""
    world = tmp_path_factory.mktemp("models") / "world"
    shutil.copytree(texts, world, symlinks=True)
    model = nnx.jit(lambda: LanguageModel(SMALL, rngs=nnx.Rngs(0)))()
    tttlm.save_pretrained(model, world / "released" / "ttt-125m")
    shutil.copytree(world / "released" / "ttt-125m", world / "released", dirs_exist_ok=True)
    shutil.copytree(FIXTURES / "reference" / "smollm", world / "llama")
    shutil.copytree(FIXTURES / "official_jax" / "ttt_linear", world / "official")
    run("train", ["--config", "configs/quickstart.yaml", "--telemetry.every", "2"], world)
    for name in ("a", "b", "125m", "inside"):
        shutil.copytree(world / "runs" / "quickstart", world / "runs" / name)
    run(
        "generate",
        ["runs/a", "--prompt_file", "book.txt", "--save_state", "book.safetensors", "--max_tokens", "0"],
        world,
    )
    return world


def run(program: str, words: list[str], folder: Path) -> None:
    before = Path.cwd()
    os.chdir(folder)
    try:
        sizes = {} if "--explain" in words else SIZES.get(program, {})  # nothing is computed
        small = [word for name, value in sizes.items() for word in (f"--{name}", value)]
        assert not importlib.import_module(f"tttlm.cli.{program}").main([*words, *small])
    finally:
        os.chdir(before)


RUN = [(program, line) for _, program, line in COMMANDS if not why_not(line)]


def test_what_is_not_run_here_is_run_elsewhere():
    lines = [line for _, _, line in COMMANDS]
    assert all(any(part in line for line in lines) for part in ELSEWHERE)
    assert len(RUN) > len(lines) / 2
    assert all(any(part in line for _, line in RUN) for part in QUICK)


@pytest.mark.parametrize(
    ("program", "line"), [pytest.param(*command, marks=marks(*command)) for command in dict.fromkeys(RUN)]
)
def test_a_command_of_the_pages_runs(program, line, request, tmp_path):
    words = words_of(line)
    without_models = program == "prepare" or (program == "shift" and "--model" not in line) or "--explain" in words
    world = request.getfixturevalue("texts" if without_models else "models")
    folder = tmp_path / "world"
    shutil.copytree(world, folder, symlinks=True)
    if "data/books" in line and program == "prepare" and "--output" not in words:
        run("prepare", ["books/**/*.txt", "--output", "data/books", "--tokenizer", "bytes"], folder)
    if program == "convert":
        shutil.rmtree(folder / words[1], ignore_errors=True)  # in another order than on the page
    if program == "train" and "--explain" not in words:
        shutil.rmtree(folder / "runs")  # resumed otherwise
        words = [re.sub(r"^(0|/shared|/mnt/shared)/runs/", "runs/", word) for word in words]  # a disk of a cluster
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            run(program, words, folder)
    else:
        run(program, words, folder)
