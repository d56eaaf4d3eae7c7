"""The training loop: batches, steps that are dispatched ahead of reading their metrics, checkpoints, and faults."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from tttlm.data import Batch, open_data
from tttlm.data.document_batches import DocumentBatches
from tttlm.data.prefetch import DevicePrefetch
from tttlm.data.store import read_manifest
from tttlm.errors import CannotWrite, InputError
from tttlm.progress import progress_bar
from tttlm.records import from_plain
from tttlm.training.carried import carries_state, check_carried
from tttlm.training.checkpoint_files import check_path, saved_steps
from tttlm.training.checkpoints import Checkpoints
from tttlm.training.clock import Clock, Totals
from tttlm.training.cluster import is_first, say, together
from tttlm.training.config import TrainConfig, check, identity
from tttlm.training.devices import device_of_kind
from tttlm.training.diagnosis import diagnose
from tttlm.training.interrupts import Interrupts, catch_interrupts
from tttlm.training.metrics import check_metrics, open_metrics
from tttlm.training.run_folder import RunFacts, RunFolder
from tttlm.training.sharding import batch_shard, check_mesh, make_mesh, place_batch
from tttlm.training.starting import initial_params
from tttlm.training.step import (
    Model,
    TrainState,
    abstract_state,
    check_memory,
    make_evaluation,
    make_init,
    make_initial_state,
    make_train_step,
)
from tttlm.training.telemetry import Measured, device_memory, make_telemetry, named


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        reason: "finished" all steps, "interrupted" (and saved), or stopped by a fault.
        step: the last update that counts.
        status: an exit status: 0, 130 after Ctrl-C, 75 after SIGTERM, 1 after a fault.
        message: a report of one or a few lines.
        seconds: time of the loop in this process.
    """

    reason: Literal["finished", "interrupted", "fault"]
    step: int
    status: int
    message: str
    seconds: float


class Fault(Exception):
    """A faulty step, with its batch for the report."""

    def __init__(self, step: int, values: dict[str, float], batch: Batch[jax.Array]) -> None:
        self.step, self.values, self.batch = step, values, batch
        self.what = (
            f"the gradient norm spiked to {values['gradient_norm']:.3g}"
            if np.isfinite(values["loss"]) and np.isfinite(values["gradient_norm"])
            else f"loss {values['loss']:.4g}, gradient norm {values['gradient_norm']:.4g}"
        )
        super().__init__(f"step {step}: {self.what}")


def train(config: TrainConfig) -> Outcome:
    """Starts or resumes the run of `config`, and trains until its last step.

    Invalid configurations are refused before anything is compiled or written.

    Raises:
        InputError: the configuration, the data or the run directory cannot be used.
    """
    check(config)
    check_metrics(config.metrics)
    folder = RunFolder(config.run)
    folder.check_config(config)
    mesh = make_mesh(config.mesh)
    check_mesh(mesh, config)
    model = Model(config.model)
    abstract = abstract_state(config, model, mesh)
    check_memory(abstract, mesh)
    loaders = together(lambda: open_loaders(config, mesh))
    tokenizer = loaders["train"].tokenizer
    facts = run_facts(config, loaders)
    new = not saved_steps(folder.checkpoints)
    start = together(lambda: initial_params(config, facts.tokenizer)) if config.init_from and new else None

    def claim() -> None:
        folder.claim(config, facts, tokenizer)
        if new:
            check_path(folder.path)

    try:
        together(lambda: claim() if is_first() else None)
        together(folder.check_shared)
        with catch_interrupts() as interrupts:
            outcome = _Experiment(config, folder, mesh, model, abstract, loaders, interrupts, start).fit()
        folder.keep()
        return outcome
    finally:
        folder.release()


def run_facts(config: TrainConfig, loaders: dict[str, Any]) -> RunFacts:
    """Data and tokenizer of the run, which are compared when it is resumed or evaluated."""
    data, train = config.data, loaders["train"]
    if data.generated.tasks:
        return RunFacts(train.fingerprint, train.tokenizer.fingerprint, loaders["validation"].fingerprint, "")
    held_out = Path(data.validation_path or data.path or next(iter(data.mixture)))
    fingerprint = read_manifest(held_out).fingerprint
    return RunFacts(train.fingerprint, train.tokenizer.fingerprint, fingerprint, str(held_out.absolute()))


def open_loaders(config: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """The loaders of both splits, each giving the examples that this process's devices hold.

    Raises:
        InputError: the data cannot be used, or has ids that the model's vocabulary lacks.
    """
    index, count = batch_shard(mesh)
    loaders = {
        split: open_data(
            config.data,
            split=split,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            seed=config.seed,
            align=config.align,
            process_index=index,
            process_count=count,
        )
        for split in ("train", "validation")
    }
    if carries_state(config):
        for loader in loaders.values():
            assert isinstance(loader.batches, DocumentBatches)
            check_carried(config, mesh, loader.batches.longest)
    vocabulary = loaders["train"].vocab_size
    if vocabulary > config.model.vocab_size:
        raise InputError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the tokenizer's {vocabulary} pieces: "
            f"set it to {vocabulary} or more"
        )
    return loaders


class _Experiment:
    """A run in this process: compiled functions, training state, data and outputs."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        mesh: Mesh,
        model: Model,
        abstract: TrainState,
        loaders: dict[str, Any],
        interrupts: Interrupts,
        start: Callable[[Any], Any] | None,
    ) -> None:
        """`start`: see `initial_params`; None initialises parameters randomly."""
        self.config, self.folder, self.loaders, self.interrupts = config, folder, loaders, interrupts
        self.mesh, self.place = mesh, place_batch(mesh)
        self.model, self.abstract = model, abstract
        self.init, self.start = make_init(config, self.model, mesh), start
        self.train_step = make_train_step(config, self.model, mesh)
        self.telemetry = make_telemetry(config, self.model, mesh)
        self.evaluation = make_evaluation(config, self.model, mesh)
        self.initial_state = make_initial_state(config, self.model, mesh)
        self.checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, identity(config))
        self.faults = 0
        self.state, self.totals = self.newest()
        self.saved = int(self.state.step)
        self.metrics = open_metrics(folder, config, self.saved)

    def newest(self) -> tuple[TrainState, Totals]:
        """The state and totals of the newest valid checkpoint, or the initial ones."""
        rest = self.abstract._replace(params=None)
        newest = self.checkpoints.newest(self.abstract.params, rest._asdict())
        if newest is None:
            state = self.init()
            return state if self.start is None else state._replace(params=self.start(self.abstract.params)), Totals()
        return TrainState(**{**newest.rest, "params": newest.params}), from_plain(newest.totals, Totals)

    def fit(self) -> Outcome:
        """Trains until the last step, an interrupt or a fault."""
        started = time.monotonic()
        if 0 < self.saved < self.config.steps:
            say(f"resuming from step {self.saved} of {self.folder.path}")
        try:
            while True:
                try:
                    step = self.advance()
                    break
                except Fault as fault:
                    report = self.report(fault)
                    if self.config.faults.policy != "rollback" or self.faults > self.config.faults.allowed:
                        return Outcome("fault", fault.step - 1, 1, report, time.monotonic() - started)
                    self.roll_back(fault, report)
            self.checkpoints.wait()
        except CannotWrite as failure:
            message = f"{failure}: free some space, and the same command resumes from step {self.checkpoints.last}"
            return Outcome("fault", self.checkpoints.last, 1, message, time.monotonic() - started)
        finally:
            self.metrics.close()
            self.checkpoints.close()
        seconds = time.monotonic() - started
        if step == self.config.steps:
            return Outcome("finished", step, 0, f"finished {step} steps", seconds)
        message = f"saved at step {step} of {self.config.steps}; the same command resumes from there"
        if step == 0:
            message = "stopped before the first step, so that there is nothing to save; the same command starts again"
        return Outcome("interrupted", step, self.interrupts.status, message, seconds)

    def advance(self) -> int:
        """Trains until the last step or an interrupt and saves; returns the last step."""
        config = self.config
        step = int(self.state.step)
        batches = DevicePrefetch(self.loaders["train"].iterate(int(self.state.batch)), self.place)
        pending: _Pending | None = None
        with progress_bar(config.steps, "compiling", unit="step", initial=step, disable=not is_first()) as bar:
            clock = self.clock()
            while step < config.steps and not self.interrupts.stop():
                with clock.waiting():
                    batch = next(batches)
                self.state, values = self.train_step(self.state, batch)
                step += 1
                if pending:  # the metrics of the previous step, while this one runs
                    self.read(pending, clock, bar)
                every = config.telemetry.every
                measured = self.telemetry(self.state.params, batch, step - 1) if every and step % every == 0 else ()
                pending = _Pending(step, values, batch, measured)
                evaluate = config.evaluate.every and step % config.evaluate.every == 0
                save = step % config.checkpoint.every == 0
                if evaluate or save or step == config.steps:
                    self.read(pending, clock, bar)
                    pending = None
                with clock.stopped():
                    if evaluate or (config.evaluate.every and step == config.steps):
                        self.evaluate(step)
                    if save:
                        self.save(step)
            if pending:
                self.read(pending, clock, bar)
        if self.saved != step:
            self.save(step)
        return step

    def clock(self) -> Clock:
        config = self.config
        tokens = config.batch_size * config.sequence_length
        flops = 3 * tokens * config.model.flops_per_token(config.sequence_length)
        device = device_of_kind(jax.devices()[0].device_kind)
        peak = device.peak_flops * jax.device_count() if device else None
        return Clock(self.totals, tokens=tokens, flops=flops, peak=peak)

    def read(self, pending: "_Pending", clock: Clock, bar: Any) -> None:
        """Waits for a step's metrics, writes and shows them.

        Raises:
            Fault: the step is faulty and the policy is not "skip".
        """
        step = pending.step
        numbers = jax.device_get(pending.values)
        self.folder.keep()  # a step was taken: from here on the folder belongs to this run
        good = bool(numbers.pop("good"))
        values = {name: numbers[name].item() for name in ("loss", *sorted(numbers.keys() - {"loss"}))}
        if clock.first:
            bar.unpause()  # compiling does not count in the estimated time
        values |= clock.tick(values["tokens"] if good else 0)
        if not good:
            self.faults += 1
            fault = Fault(step, values, pending.batch)
            self.write(step, {"fault": fault.what, "batch": int(self.state.batch - self.state.step) + step - 1})
            if self.config.faults.policy != "skip" or self.faults > self.config.faults.allowed:
                raise fault
            if is_first():
                say(f"{fault}: skipped")
        elif step % self.config.metrics.every == 0 or step == self.config.steps:
            self.write(step, values | device_memory() | named(jax.device_get(pending.measured)))
        bar.set_description_str("training", refresh=False)
        speed = values.get("tokens_per_second")
        bar.set_postfix_str(f"loss {values['loss']:.3f}" + (f", {speed:,.0f} tokens/s" if speed else ""), refresh=False)
        bar.update(1)

    def evaluate(self, step: int) -> None:
        """Writes the held-out loss on the first batches of the validation split."""
        params, sums = self.state.params, []
        carried = self.initial_state(params)
        for number in range(self.config.evaluate.batches):
            batch = self.place(self.loaders["validation"][number])
            of_batch, carried = self.evaluation(params, batch, carried)
            sums.append(of_batch)
        loss, weight = np.sum(jax.device_get(sums), axis=0)
        self.write(step, {"validation_loss": float(loss / weight)})

    def save(self, step: int) -> None:
        rest = self.state._replace(params=None)
        with self.written():
            self.metrics.flush()
        with self.written():
            self.checkpoints.wait()
        with self.written():
            self.checkpoints.save(step, self.state.params, rest._asdict(), self.totals.as_dict())
        self.saved = step

    @contextmanager
    def written(self) -> Iterator[None]:
        """Failed writes inside stop the run, or are reported and ignored if `checkpoint.on_failure` is "continue"."""
        try:
            yield
        except CannotWrite as failure:
            if self.config.checkpoint.on_failure == "stop":
                raise
            say(f"{failure}; continuing without it")

    def write(self, step: int, values: dict[str, Any]) -> None:
        with self.written():
            self.metrics.write(step, values)

    def report(self, fault: Fault) -> str:
        """A diagnosis of the fault, by running the batch again from the parameters before it."""
        try:
            with jax.set_mesh(self.mesh):
                state = self.state
                where = diagnose(self.config, self.model, state.params, fault.batch, fault.step, state.carried)
        except jax.errors.JaxRuntimeError as error:  # most likely out of memory
            where = f"its origin could not be determined: {str(error).splitlines()[0]}"
        saved = self.checkpoints.last
        last = f"the last checkpoint is of step {saved}" if saved else "there is no checkpoint yet"
        return f"{fault}: {where}; {last}"

    def roll_back(self, fault: Fault, report: str) -> None:
        """Restores the newest checkpoint and continues with the batches after the faulty one."""
        say(f"{report}; rolling back to it")
        after = self.state.batch - (self.state.step - fault.step)
        with self.written():
            self.checkpoints.wait()
        state, self.totals = self.newest()
        # Documents in progress continue from the initial state, without the tokens read of them before.
        self.state = state._replace(batch=after, carried=self.initial_state(state.params))
        self.saved = int(self.state.step)
        self.metrics.close()
        self.metrics = open_metrics(self.folder, self.config, self.saved)
        self.write(self.saved, {"fault": report})


@dataclass
class _Pending:
    """A dispatched step whose metrics have not been read yet."""

    step: int
    values: dict[str, jax.Array]
    batch: Batch[jax.Array]
    measured: Measured
