"""The sweep takes the learning rate with the lowest held-out loss, and what it chose is what is trained."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from tests.training.small import small_config
from tttlm.comparison.experiment import (
    CompareConfig,
    Comparison,
    Entry,
    finished_runs,
    runs_of,
    sweep_runs,
    with_best_rates,
)
from tttlm.comparison.report import sweep_lines
from tttlm.comparison.sweep import SweepConfig, check_sweep
from tttlm.errors import InputError
from tttlm.training.config import to_dict
from tttlm.training.run_folder import RunFolder, with_head

RATES = (1e-3, 1.5e-3, 2e-3)


def comparison(folder: Path, steps: int) -> Comparison:
    run = small_config(folder / "runs" / "a-0", **{"optimizer.learning_rate": 0.5})
    runs = tuple(dataclasses.replace(run, seed=seed, run=f"{folder}/runs/a-{seed}") for seed in (0, 1))
    config = CompareConfig(output=str(folder), seeds=(0, 1), sweep=SweepConfig(RATES, steps))
    return Comparison(config, (Entry("a", runs), Entry("done", runs, given=True)), folder)


def write_losses(found: Comparison, losses: list[float | None]) -> None:
    """As runs of the sweep do: an earlier, lower loss does not count."""
    for (_, run), loss in zip(sweep_runs(found), losses, strict=True):
        Path(run.run).mkdir(parents=True)
        lines = [{"step": 1, "validation_loss": 0.5}, {"step": run.steps, "validation_loss": loss}]
        (Path(run.run) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("steps", [5, 0])
def test_every_seed_is_trained_at_the_best_rate(tmp_path, steps):
    found = comparison(tmp_path, steps)
    runs = [run for _, run in sweep_runs(found)]
    assert [run.optimizer.learning_rate for run in runs] == list(RATES)
    assert len({run.run for run in runs}) == 3
    assert {run.steps for run in runs} == {steps or 12}
    write_losses(found, [3.0, 2.0, float("nan")])
    chosen = with_best_rates(found)
    assert [run.optimizer.learning_rate for _, run in runs_of(chosen)] == [1.5e-3, 1.5e-3]
    # A sweep of full length has trained the first seed already.
    where = [Path(run.run).parent.name for _, run in runs_of(chosen)]
    assert where == (["runs", "runs"] if steps else ["sweep", "runs"])
    assert [run.steps for _, run in runs_of(chosen)] == [12, 12]
    assert chosen.entries[1] == found.entries[1]


def test_the_table_names_the_best_and_says_if_the_range_was_too_small(tmp_path):
    found = comparison(tmp_path, 5)
    write_losses(found, [3.0, 2.5, 2.0])
    text = "\n".join(sweep_lines(with_best_rates(found)))
    assert "| a | 3.000 | 2.500 | **2.000** |" in text
    assert "after 5 steps" in text
    assert "at an end of the range for a." in text
    assert not list(sweep_lines(found))


def test_the_finished_runs_of_a_model_differ_in_their_seeds_alone(tmp_path):
    for name, changes in (("a", {}), ("b", {"seed": 1}), ("c", {"seed": 1, "model.rope_theta": 500.0})):
        folder = RunFolder(tmp_path / name)
        config = small_config(folder.path, **changes)
        (folder.checkpoints / str(config.steps) / "params").mkdir(parents=True)
        folder.config.write_text(with_head(yaml.safe_dump(to_dict(config))))
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert [run.seed for run in finished_runs("m", [a, b])] == [0, 1]
    with pytest.raises(InputError, match=r"models\.m names a run twice"):
        finished_runs("m", [a, b, f"{tmp_path}/b/../a"])
    with pytest.raises(InputError, match=r"differ in more than their seeds, .*model.rope_theta: 10000.0 -> 500.0"):
        finished_runs("m", [a, c])


def test_a_sweep_that_cannot_choose_is_refused(tmp_path):
    run = small_config()
    check_sweep(SweepConfig(RATES, 5), run)
    bad = [
        (SweepConfig((1e-3, 2e-3, 1.0000001e-3)), run, "names 0.001 twice"),
        (SweepConfig(RATES), small_config(**{"evaluate.every": 0}), "set train.evaluate.every above 0"),
    ]
    for sweep, of_run, words in bad:
        with pytest.raises(InputError, match=words):
            check_sweep(sweep, of_run)
    found = comparison(tmp_path, 5)
    write_losses(found, [float("nan"), float("inf"), float("nan")])
    with pytest.raises(InputError, match=r"no run of the sweep has a finite held-out loss \(0.001, 0.0015, 0.002\)"):
        with_best_rates(found)
    _, last = sweep_runs(found)[-1]
    (Path(last.run) / "metrics.jsonl").write_text('{"step": 1, "validation_loss": 0.5}\n')
    with pytest.raises(InputError, match="has no validation_loss of step 5"):
        with_best_rates(found)
