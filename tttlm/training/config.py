"""Configuration of a training run: frozen dataclasses, and the constraints between their fields."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tttlm.data import DataConfig
from tttlm.errors import InputError
from tttlm.fields import check_fields, from_values, read_again, refuse_unused
from tttlm.mixers import mixer_names, registered, section_of
from tttlm.model import ModelConfig
from tttlm.model.precision import check_precision
from tttlm.ranges import Count, CountOrZero, FilePath, NonNegativeFloat, OutputPath, PositiveFloat, Range, Seed

Decay = Annotated[float, Range(least=0, below=1)]  # decay of a running mean
Axis = Annotated[int, Range(least=1, most=2**20, also=(-1,))]  # size of an axis of the mesh


@dataclass(frozen=True)
class OptimizerConfig:
    """Configuration of the optimiser. The gradient is clipped by its global norm."""

    name: Literal["adamw", "adam", "lion", "muon", "adafactor"] = "adamw"
    """The method. adam is adamw without weight decay; muon updates the kernels of projections, and Adam updates the
    other parameters."""
    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate, reached at the end of the warm-up."""
    b1: Decay = 0.9
    """Decay of the running mean of the gradient."""
    b2: Decay = 0.95
    """Decay of the running mean of the squared gradient."""
    eps: PositiveFloat = 1e-8
    """Epsilon added to the root of that mean before the division by it."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay: this fraction of a parameter, times the learning rate, is subtracted at each update."""
    decay: Literal["matrices", "all"] = "matrices"
    """The parameters that decay: matrices and embeddings, or all, including norms and biases."""
    clip: NonNegativeFloat = 1.0
    """Largest global norm of the gradient; 0 does not clip."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Configuration of the learning rate (linear warm-up, then a cosine to `final`) and the inner learning rate."""

    warmup_steps: CountOrZero | None = None
    """Steps of linear warm-up; None is a tenth of the run."""
    warmup_start: Literal["one_step", "zero"] = "one_step"
    """The learning rate of the first update: peak / warm-up steps, or 0, which changes nothing."""
    final: NonNegativeFloat = 1e-5
    """The learning rate at the last step."""
    inner_start: PositiveFloat | None = None
    """Multiplier of the inner learning rate at the first step; None takes the mixers' default: 0.1 with TTT-MLP layers,
    else 1."""
    inner_warmup_steps: CountOrZero | None = None
    """Steps until that multiplier is 1; None is a tenth of the run."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Configuration of the held-out loss: on fixed batches during training, on complete documents at the end."""

    every: CountOrZero = 200
    """Steps between two evaluations; 0 never evaluates."""
    batches: Count = 8
    """Batches of held-out text in an evaluation during training, the same each time."""
    final_bytes: CountOrZero = 2_000_000
    """Amount of held-out text that is scored at the end of the run, in complete documents; 0 scores none."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Configuration of checkpoints: when the training state is saved, and which checkpoints are kept."""

    every: Count = 500
    """Steps between two checkpoints. The last step and an interrupted one are saved as well."""
    keep_last: Count = 2
    """Number of the newest checkpoints that are kept."""
    keep_every: CountOrZero = 0
    """Checkpoints at multiples of this step are never deleted; 0 keeps only the newest ones."""
    on_failure: Literal["stop", "continue"] = "stop"
    """Action when a checkpoint or a line of metrics cannot be written, on a full disk for instance: stop, or continue
    without it. Earlier checkpoints are kept."""


@dataclass(frozen=True)
class FaultsConfig:
    """What to do about a step whose loss or gradient is not finite, or whose gradient norm spikes."""

    policy: Literal["stop", "skip", "rollback"] = "stop"
    """stop with a report; skip the update; or roll back to the last checkpoint and skip the batches since."""
    spike: NonNegativeFloat = 0.0
    """A gradient norm of this many times its running mean counts as a fault; 0 accepts every finite norm."""
    allowed: CountOrZero = 10
    """Number of faults that are skipped or rolled back before the run stops."""


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices of each axis of the mesh; -1, on one axis, takes all remaining devices."""

    data: Axis = 1
    """Number of replicas of the model, each with its part of the batch."""
    fsdp: Axis = -1
    """Number of shards of parameters, optimiser state and batch."""
    tensor: Axis = 1
    """Number of shards of heads, channels, intermediate size and vocabulary."""
    context: Axis = 1
    """Number of shards of the sequence; within a mixer, its heads or channels have tensor x context shards."""


@dataclass(frozen=True)
class DistributedConfig:
    """The processes that train together: one for each host with TPUs, one for each GPU (docs/cluster.md)."""

    mode: Literal["auto", "on", "off"] = "auto"
    """auto connects the processes of SLURM, Kubernetes, Open MPI and TPU pods, and trains in one process outside of
    them; on fails outside of them; off trains in one process."""
    coordinator: str | None = None
    """host:port of process 0; None detects it."""
    processes: Count | None = None
    """Number of processes; None detects it."""
    process: CountOrZero | None = None
    """Index of this process, from 0; None detects it."""


@dataclass(frozen=True)
class MetricsConfig:
    """Configuration of metrics and of trackers besides `metrics.jsonl`."""

    every: Count = 1
    """Steps between two lines of metrics."""
    tensorboard: Literal["auto", "on", "off"] = "auto"
    """auto writes TensorBoard files when tensorboardX is installed."""
    wandb: str = ""
    """A Weights & Biases project to log to; empty logs to none."""


@dataclass(frozen=True)
class TelemetryConfig:
    """Configuration of measurements inside the layers during training."""

    every: CountOrZero = 0
    """Steps between two measurements of every TTT layer: inner loss before and after the update, inner learning rate,
    norm and drift of the inner weights. A measurement costs about a forward pass; 0 measures nothing."""


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run."""

    run: OutputPath = "runs/default"
    """The run directory: configuration, metrics, checkpoints."""
    model: ModelConfig = field(default_factory=ModelConfig)
    init_from: FilePath = ""
    """Source of the initial parameters, for fine-tuning: another run directory, one of its checkpoints
    (RUN/checkpoints/STEP), or a released checkpoint (docs/checkpoints.md). Only parameters are taken from it; empty
    initialises them randomly."""
    init_from_changes: tuple[str, ...] = ()
    """Fields of `model` that may differ from the model of `init_from`, such as rope_theta. Any other difference that
    changes what the parameters compute is refused."""
    data: DataConfig = field(default_factory=DataConfig)
    steps: Count = 1000
    """Number of parameter updates in the run."""
    batch_size: Count = 16
    """Sequences in a batch, over all devices."""
    sequence_length: Count = 512
    """Tokens of a sequence."""
    accumulate: Count = 1
    """Number of parts that a batch is processed in, one after another, to save memory (gradient accumulation)."""
    loss_chunk: CountOrZero = 0
    """Tokens of a sequence whose logits a device computes at a time; 0 takes all tokens of its shard."""
    seed: Seed = 0
    """Seed of the initial parameters and of the order of the batches."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up of the learning rate."""
        steps = self.schedule.warmup_steps
        return self.steps // 10 if steps is None else steps

    @property
    def inner_warmup_steps(self) -> int:
        """Steps of the warm-up of the inner learning rate."""
        steps = self.schedule.inner_warmup_steps
        return self.steps // 10 if steps is None else steps

    @property
    def align(self) -> int:
        """Documents of a packed batch start at multiples of this many tokens, so that they are read as if alone."""
        return self.model.alignment

    @property
    def inner_start(self) -> float:
        """Multiplier of the inner learning rate at the first step."""
        start = self.schedule.inner_start
        return min(mixer.inner_warmup_start for mixer in self.model.pattern) if start is None else start


MAX_BATCH_TOKENS = 2**28  # a gigabyte of ids; the largest published batches have 2**24

# A run may be resumed with these changed: they do not affect results, or only the order and precision of sums.
FREE_TO_CHANGE = (
    *(
        "run",
        "mesh.",
        "distributed.",
        "metrics.",
        "telemetry.",
        "checkpoint.",
        "faults.",
        "evaluate.",
        "loss_chunk",
        "accumulate",
    ),
    *("model.dtype", "model.param_dtype", "model.remat"),
)


def is_free_to_change(name: str) -> bool:
    """Whether a run may be resumed with another value of the field of that dotted name."""
    of_mixers = (f"model.{section_of(m)}.{field}" for m in mixer_names() for field in registered(m).changes_no_result)
    return name.startswith((*FREE_TO_CHANGE, *of_mixers))


def check(config: TrainConfig) -> None:
    """Refuses invalid combinations of fields. Constraints on the data or the devices are checked once these are known.

    Raises:
        InputError: names the constraint, the values and what to do.
    """
    check_fields(config)
    config.data.validate()
    trained = config.data.prepare
    _require(
        not (trained.given and trained.tokenizer == "train" and trained.vocab_size > config.model.vocab_size),
        f"model.vocab_size = {config.model.vocab_size} is smaller than the {trained.vocab_size} pieces of "
        "data.prepare.vocab_size: make them equal",
    )
    rate = config.optimizer.learning_rate
    _require(
        config.schedule.final <= rate,
        f"schedule.final = {config.schedule.final} is above optimizer.learning_rate = {rate}: lower it",
    )
    for name, value in (("warmup_steps", config.warmup_steps), ("inner_warmup_steps", config.inner_warmup_steps)):
        _require(
            0 <= value <= config.steps,
            f"schedule.{name} = {value} does not fit a run of {config.steps} steps: shorten it or raise steps",
        )
    tokens = config.batch_size * config.sequence_length
    _require(
        tokens <= MAX_BATCH_TOKENS,
        f"batch_size * sequence_length = {tokens:,} tokens, at most {MAX_BATCH_TOKENS:,} are possible: lower one",
    )
    _require(
        config.batch_size % config.accumulate == 0,
        f"batch_size = {config.batch_size} is not divisible by accumulate = {config.accumulate}: change one",
    )
    _require(
        not config.loss_chunk or config.sequence_length % config.loss_chunk == 0,
        f"sequence_length = {config.sequence_length} is not a multiple of loss_chunk = {config.loss_chunk}: change one",
    )
    check_precision(config.model)
    if not config.init_from:
        refuse_unused(config, "without init_from", "init_from_changes")
    if config.distributed.mode == "off":
        refuse_unused(
            config, "with distributed.mode off", *(f"distributed.{n}" for n in ("coordinator", "processes", "process"))
        )
    _require(
        config.optimizer.name != "adam" or config.optimizer.weight_decay == 0,
        f"optimizer.name adam has no weight decay, got optimizer.weight_decay = {config.optimizer.weight_decay}: "
        "set it to 0, or name adamw",
    )
    sizes = dataclasses.asdict(config.mesh)
    _require(list(sizes.values()).count(-1) <= 1, f"only one axis of `mesh` can be -1, got {sizes}: set the others")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as nested dicts and lists of plain values, ready for YAML and JSON."""
    return _plain(dataclasses.asdict(config))


def from_dict(cls: Any, values: dict[str, Any]) -> Any:
    """A configuration dataclass from the result of `to_dict`.

    Raises:
        InputError: a name is not a field, or a value is invalid for its field.
    """
    return from_values(cls, values)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted names."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def differences(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """The differences that prevent resuming a run started with `saved` under `config`, as 'name: then -> now'."""
    then, now = flat(saved), flat(to_dict(config))
    return [
        f"{name}: {then.get(name)} -> {now.get(name)}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name) and not is_free_to_change(name)
    ]


def identity(config: TrainConfig) -> str:
    """A digest of all that a run may not be resumed with another value of; its checkpoints carry it."""
    default = flat(to_dict(TrainConfig()))
    values = flat(to_dict(read_again(config)))
    # Without defaults, so that a new field changes no identity.
    kept = {name: v for name, v in values.items() if not is_free_to_change(name) and v != default.get(name)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
