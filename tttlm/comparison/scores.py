"""A run's score for a comparison: its loss by position and the memory of its training step, stored in its folder."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tttlm.comparison.experiment import Comparison
from tttlm.data import Batch, held_out_documents
from tttlm.data.store import read_manifest
from tttlm.errors import InputError
from tttlm.evaluation.positions import PositionsConfig, edges, losses_by_position, some, stretches
from tttlm.evaluation.run import load_run
from tttlm.records import read_record, write_json
from tttlm.training.checkpoint_files import checkpoint_digest
from tttlm.training.config import TrainConfig
from tttlm.training.run_folder import RunFolder
from tttlm.training.sharding import make_mesh
from tttlm.training.step import Model, abstract_state, make_train_step

SCORES = "scores.json"


@dataclass(frozen=True)
class ScoreRecord:
    """A score, as it is stored in the run directory.

    Attributes:
        key: everything the score depends on, see `score_key`.
        bins: starts of the bins of positions, and the end of the last.
        documents: names of the documents.
        bytes_per_token: bytes per token of every document.
        nats, tokens: `[documents, bins]`, summed losses and numbers of tokens.
        step_memory: memory of the compiled step in bytes; None if unknown.
        device, jax: the device and the version of JAX that computed it.
        sha256: the digest of all of the above.
    """

    key: dict[str, Any]
    bins: list[int]
    documents: list[str]
    bytes_per_token: list[float]
    nats: list[list[float]]
    tokens: list[list[float]]
    step_memory: int | None
    device: str
    jax: str
    sha256: str = ""

    def sealed(self) -> "ScoreRecord":
        """Returns the record with its digest."""
        text = json.dumps(asdict(replace(self, sha256="")), sort_keys=True)
        return replace(self, sha256=hashlib.sha256(text.encode()).hexdigest())


@dataclass(frozen=True)
class JobRun:
    """A run to score, see `make_score`."""

    name: str
    folder: str
    key: dict[str, Any]
    with_memory: bool


@dataclass(frozen=True)
class Job:
    """Runs to score on the held-out documents of a prepared folder."""

    test: str
    settings: PositionsConfig
    runs: list[JobRun]


def score_key(run: TrainConfig, test: Path, settings: PositionsConfig) -> dict[str, Any]:
    """Everything a score depends on: a score with another key is computed again."""
    text = read_manifest(test).fingerprint
    checkpoint = checkpoint_digest(RunFolder(run.run).checkpoints, run.steps)
    facts = {"step": run.steps, "checkpoint": checkpoint, "trained": run.sequence_length, "text": text}
    return {**facts, **asdict(settings)}


def read_score(folder: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """Reads the score in a run directory; None if it has another key or was altered, so that it is computed again."""
    try:
        record = read_record(folder / SCORES, ScoreRecord, advice="")
    except InputError:
        return None
    return asdict(record) if record.key == key and record.sealed().sha256 == record.sha256 else None


def text_of(comparison: Comparison) -> Path:
    """The prepared folder that models of text are scored on."""
    assert comparison.test is not None, "generated sequences have no text"
    return comparison.test


def scoring_job(comparison: Comparison) -> Path | None:
    """Writes the runs that are not scored yet into a file for `do_scoring_job`; None if there are none."""
    settings, test = comparison.config.positions, text_of(comparison)
    runs = []
    for entry in comparison.entries:
        for index, run in enumerate(entry.configs):
            key = score_key(run, test, settings)
            if read_score(Path(run.run), key) is None:
                name = f"{entry.name}, seed {run.seed}"
                runs.append(JobRun(name, run.run, key, with_memory=index == 0))
    if not runs:
        return None
    file = Path(comparison.config.output) / "scoring.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, Job(str(test), settings, runs))
    return file


def do_scoring_job(file: Path) -> None:
    """Scores one run after another; each score is written at once, so that a stopped job can be resumed."""
    job = read_record(file, Job, advice="start the comparison again")
    for number, run in enumerate(job.runs, start=1):
        make_score(
            Path(run.folder),
            Path(job.test),
            job.settings,
            run.key,
            with_memory=run.with_memory,
            description=f"scoring {run.name} ({number}/{len(job.runs)})",
        )


def make_score(
    folder: Path,
    test: Path,
    settings: PositionsConfig,
    key: dict[str, Any],
    *,
    with_memory: bool,
    description: str,
) -> None:
    """Scores a finished run and writes the score to its folder; `with_memory` compiles its step for its memory."""
    trained = key["trained"]
    length = settings.length or 4 * trained
    chunk = min(trained, length)
    # An attention cache as long as the segments.
    run = load_run(folder, key["step"], max_length=-(-length // chunk) * chunk)
    documents = [document for document in held_out_documents(test) if len(document.tokens) > 1]
    if not documents:
        raise InputError(f"{test} has no documents to report on")
    documents = some(documents, settings.documents)
    bins = edges(length, trained)
    nats, tokens = losses_by_position(
        run.model,
        stretches(documents, length, settings.stretches),
        bins,
        batch_size=settings.batch_size,
        chunk=chunk,
        description=description,
    )
    score = ScoreRecord(
        key=key,
        bins=bins,
        documents=[document.name for document in documents],
        bytes_per_token=[document.bytes / (len(document.tokens) - 1) for document in documents],
        nats=nats.tolist(),
        tokens=tokens.tolist(),
        step_memory=step_memory(run.config) if with_memory else None,
        device=device_name(),
        jax=jax.__version__,
    )
    write_json(folder / SCORES, score.sealed())


def step_memory(config: TrainConfig) -> int | None:
    """Memory of the compiled step per device in bytes: parameters, optimiser state, batch, temporaries."""
    mesh = make_mesh(config.mesh)
    model = Model(config.model)
    ids = jax.ShapeDtypeStruct((config.batch_size, config.sequence_length), jnp.int32)
    step: Any = make_train_step(config, model, mesh)
    lowered = step.lower(abstract_state(config, model, mesh), Batch(ids, ids))
    plan = lowered.compile().memory_analysis()
    if plan is None:
        return None
    outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return int(plan.argument_size_in_bytes + plan.temp_size_in_bytes + outputs)


def device_name() -> str:
    """The devices of JAX; for a CPU its name, and the number of cores that this process may use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{len(jax.devices())} x {device.device_kind}"
    name = "CPU"
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} x {name}"
