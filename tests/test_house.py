"""The house: imports run downward, importing the package is light, configuration files are whole."""

import ast
import subprocess
import sys
import time
from graphlib import TopologicalSorter
from pathlib import Path

import tttlm

ROOT = Path(tttlm.__file__).parent
ROOMS = [
    "ops",
    "parts",
    "mixers",
    "layers",
    "linen",
    "model",
    "inference",
    "interop",
    "data",
    "shift",
    "training",
    "planning",
    "adaptation",
    "evaluation",
    "comparison",
    "cli",
]  # from the ground up
# Data knows nothing of models: it stands beside them, and brings text to batches without JAX.
APART = {"data": {"inference", "interop", "model", "layers", "mixers", "parts", "ops"}, "interop": {"data"}}


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules = [node.module or ""]
        names |= {m.split(".")[1] for m in modules if m.startswith("tttlm.") and m.split(".")[1] in ROOMS}
    return names


def test_imports_run_downward_only():
    seen = 0
    for i, room in enumerate(ROOMS):
        for path in (ROOT / room).rglob("*.py"):
            rooms = imported_rooms(path)
            seen += len(rooms)
            assert not rooms & set(ROOMS[i + 1 :]), f"{path} imports from a room above it"
            assert not rooms & APART.get(room, set()), f"{path} imports from a room it stands apart from"
    assert seen > 20


def test_no_two_modules_import_each_other():
    """Imports within functions count as well: they hide a circle, they do not break it."""
    modules = {".".join(p.relative_to(ROOT.parent).with_suffix("").parts): p for p in ROOT.rglob("*.py")}
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found = {known for known in (node.module, *names) if known in modules}
                sorter.add(name, *(found - {name}))
    sorter.prepare()


def test_importing_the_package_is_light():
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", "import tttlm, sys; print('jax' in sys.modules, tttlm.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.perf_counter() - start < 3
    assert done.stdout.split() == ["False", "0.2.0"]


def test_every_public_name_is_there():
    for name in tttlm.__all__:
        assert getattr(tttlm, name).__name__ == name
    assert set(tttlm.__all__) <= set(dir(tttlm))
