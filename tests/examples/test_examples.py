"""Every example runs, and what it trains gets better."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "transformer": {"steps": 12, "hidden_size": 16, "num_layers": 1},
    "linen_transformer": {"steps": 12, "hidden_size": 16, "num_layers": 1},
    "forecast": {"steps": 12, "time": 16, "hidden_size": 16},
}


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_an_example_learns(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    losses = module.main(**SMALL[name])
    assert len(losses) == SMALL[name]["steps"]
    assert sum(losses[-3:]) < sum(losses[:3])
