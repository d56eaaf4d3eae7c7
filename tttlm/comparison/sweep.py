"""The learning rate of each model: short runs with several rates, of which the best on held-out data is taken."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tttlm.errors import InputError
from tttlm.ranges import CountOrZero, PositiveFloat
from tttlm.training.config import TrainConfig
from tttlm.training.metrics import by_step, read_metrics
from tttlm.training.run_folder import RunFolder


@dataclass(frozen=True)
class SweepConfig:
    """Configuration of the search for every model's learning rate, which precedes the runs that are compared."""

    learning_rates: tuple[PositiveFloat, ...] = ()
    """Peak learning rates; a model takes the one with the lowest held-out loss at the end of a run with the first seed.
    Without any, models keep their `optimizer.learning_rate`."""
    steps: CountOrZero = 0
    """Steps of a run of the sweep, with a schedule of that length; 0 takes those of `train`, and the best run of the
    sweep is then that of the first seed."""


@dataclass(frozen=True)
class Swept:
    """A run of the sweep: its learning rate and its held-out loss in nats per token, infinite if it is not finite."""

    learning_rate: float
    loss: float


def check_sweep(sweep: SweepConfig, run: TrainConfig) -> None:
    """Refuses a sweep that cannot choose a rate.

    Args:
        sweep: the configuration of the sweep.
        run: a run of the comparison.

    Raises:
        InputError: two rates are equal to six digits, or no held-out loss is measured.
    """
    rates = [f"{rate:g}" for rate in sweep.learning_rates]
    if twice := [rate for rate in rates if rates.count(rate) > 1]:
        raise InputError(f"sweep.learning_rates names {twice[0]} twice (six digits count): name different rates")
    if rates and not sweep.steps and not run.evaluate.every:
        raise InputError("a sweep chooses by the held-out loss: set train.evaluate.every above 0, or sweep.steps")


def runs_of_sweep(sweep: SweepConfig, run: TrainConfig, name: str, folder: Path) -> Iterator[TrainConfig]:
    """The runs of one model: those of `run` with other rates, whose faulty steps are skipped.

    Args:
        sweep: the rates and the number of steps.
        run: the run with the first seed.
        name: the name of the model.
        folder: the folder of the runs.
    """
    for rate in sweep.learning_rates:
        swept = replace(
            run,
            run=str(folder / f"{name}-{rate:g}"),
            optimizer=replace(run.optimizer, learning_rate=rate),
            faults=replace(run.faults, policy="skip", allowed=run.steps),
        )
        if steps := sweep.steps:
            evaluate, checkpoint = replace(run.evaluate, every=steps), replace(run.checkpoint, every=steps)
            swept = replace(swept, steps=steps, evaluate=evaluate, checkpoint=checkpoint)
        yield swept


def swept(runs: Iterator[TrainConfig]) -> tuple[Swept, ...]:
    """The results of finished runs of the sweep.

    Raises:
        InputError: a run has no held-out loss of its last step, or no run has a finite one.
    """
    found = []
    for run in runs:
        metrics = RunFolder(run.run).metrics
        points = by_step(read_metrics(metrics), "validation_loss")
        last = points[points[:, 0] == run.steps, 1]
        if not len(last):
            raise InputError(
                f"{metrics} has no validation_loss of step {run.steps}: restore it, or delete its folder and the run "
                "is trained again"
            )
        found.append(Swept(run.optimizer.learning_rate, float(last[-1]) if np.isfinite(last[-1]) else float("inf")))
    if found and not np.isfinite(best(tuple(found)).loss):
        rates = ", ".join(f"{one.learning_rate:g}" for one in found)
        raise InputError(f"no run of the sweep has a finite held-out loss ({rates}): name lower sweep.learning_rates")
    return tuple(found)


def best(results: tuple[Swept, ...]) -> Swept:
    """The result with the lowest loss."""
    return min(results, key=lambda result: result.loss)
