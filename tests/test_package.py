"""The package as a person installs it: a core that is light, extras that are named, a wheel that is whole."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tttlm
from tests.training.small import write_texts
from tttlm.extras import EXTRAS, advice

ROOT = Path(__file__).parents[1]
# Flax itself brings these.
OF_FLAX = {"optax", "yaml", "orbax"}
CORE = """
import importlib, importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
import tttlm
import jax.numpy as jnp
from flax import nnx
layer = tttlm.TTTLinear(8, 2, mini_batch_size=4, rngs=nnx.Rngs(0))
print(layer(jnp.ones((1, 4, 8))).shape)
for room in ("ops", "layers", "model", "interop", "adaptation", "shift"):
    assert getattr(tttlm, room) is importlib.import_module(f"tttlm.{{room}}"), room
for name in tttlm.__all__:
    getattr(tttlm, name)
"""


def test_layers_models_and_released_checkpoints_work_without_the_extras():
    blocked = sorted(set(EXTRAS) - OF_FLAX)
    code = CORE.format(blocked=blocked)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(1, 4, 8)\n"


def test_every_room_is_an_attribute():
    for room in tttlm._ROOMS:
        assert getattr(tttlm, room).__name__ == f"tttlm.{room}"
        assert room in dir(tttlm)
    with pytest.raises(AttributeError, match="no attribute 'basement'"):
        _ = tttlm.basement  # type: ignore[attr-defined]


def test_a_package_that_is_missing_is_named_with_its_extra():
    assert advice("orbax.checkpoint") == (
        "this needs the package orbax, which is not installed: pip install 'tttlm[train]'"
    )
    assert advice("json") is None
    declared = (ROOT / "pyproject.toml").read_text()
    for extra in set(EXTRAS.values()):
        assert f"\n{extra} = [" in declared


def python(folder: Path) -> Path:
    """A new environment; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / "bin" / "python"


def run(*words: str | Path, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, cwd=folder, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, folder=folder)
    assert len(list(folder.glob("*.tar.gz"))) == 1
    (wheel,) = folder.glob("*.whl")  # built from the source distribution
    return wheel


@pytest.mark.slow
def test_the_wheel_holds_the_configurations_and_the_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"tttlm/configs/{file.relative_to(ROOT / 'configs')}" for file in (ROOT / "configs").rglob("*.yaml")}
    assert len(shipped) > 50
    assert shipped | {"tttlm/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests/", "configs/", "benchmarks/"))]


@pytest.mark.slow
def test_the_core_installs_alone(wheel, tmp_path):
    core = python(tmp_path / "core")
    run(core, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, folder=tmp_path)
    code = "import importlib.metadata as m; print(sum('extra' not in name for name in m.requires('tttlm')))"
    assert int(run(core, "-c", code, folder=tmp_path)) <= 7
    assert run(core, "-c", CORE.format(blocked=[]), folder=tmp_path) == "(1, 4, 8)\n"
    done = subprocess.run([core.parent / "tttlm-train"], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "error: this needs the package tyro, which is not installed: pip install 'tttlm[train]'\n"


@pytest.mark.slow
def test_a_clean_environment_prepares_trains_evaluates_and_plots_from_an_empty_folder(wheel, tmp_path):
    full, work = python(tmp_path / "full"), tmp_path / "work"
    run(full, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel}[train]", folder=tmp_path)
    write_texts(work / "texts")
    command = lambda name, *words: run(full.parent / name, *words, folder=work)
    command("tttlm-prepare", "texts", "--output", "data", "--tokenizer", "bytes", "--held-out", "0.25")
    command("tttlm-prepare", "--check", "data")
    (work / "own.yaml").write_text("data: {path: data}\nmetrics: {tensorboard: off}\nmodel: {vocab_size: 300}\n")
    small = "--model.hidden_size 16 --model.num_layers 2 --model.num_heads 2 --model.intermediate_size 16 --steps 4"
    small += " --sequence_length 32 --loss_chunk 32 --evaluate.batches 2"
    assert "4096" in command("tttlm-train", "--config", "quickstart", "--explain")
    out = command("tttlm-train", "--config", "own.yaml", "--run", "run", *small.split())
    assert "bits per byte" in out
    assert "bits per byte" in command("tttlm-eval", "run", "--text", "texts/00.txt")
    assert command("tttlm-plot", "run").strip() == "run/plot.png"
    assert "complete -F" in command("tttlm-train", "--tyro-print-completion", "bash")
