"""The learning rate of each model: short runs with several rates, of which the best on held-out data is taken."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

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
    """The results of finished runs of the sweep."""
    found = []
    for run in runs:
        losses = by_step(read_metrics(RunFolder(run.run).metrics), "validation_loss")[-1:, 1]
        loss = float(losses[0]) if len(losses) and np.isfinite(losses[0]) else float("inf")
        found.append(Swept(run.optimizer.learning_rate, loss))
    return tuple(found)


def best(results: tuple[Swept, ...]) -> Swept:
    """The result with the lowest loss."""
    return min(results, key=lambda result: result.loss)
