"""What a training run is: frozen dataclasses, and the rules that a combination of them has to keep."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tttlm.data import DataConfig
from tttlm.errors import InputError
from tttlm.fields import check_fields, from_values
from tttlm.mixers import mixer_names, registered, section_of
from tttlm.model import ModelConfig
from tttlm.model.precision import check_precision
from tttlm.ranges import Count, CountOrZero, FilePath, NonNegativeFloat, OutputPath, PositiveFloat, Range, Seed

Decay = Annotated[float, Range(least=0, below=1)]  # of a running mean
Axis = Annotated[int, Range(least=1, most=2**20, also=(-1,))]  # of the mesh


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters learn from the gradient, which is clipped by its global norm."""

    name: Literal["adamw", "adam", "lion", "muon", "adafactor"] = "adamw"
    """The method. adam is adamw without weight decay; muon takes the kernels of projections for matrices and leaves the
    other parameters to Adam."""
    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate, reached at the end of the warm-up."""
    b1: Decay = 0.9
    """Decay of the running mean of the gradient."""
    b2: Decay = 0.95
    """Decay of the running mean of the squared gradient."""
    eps: PositiveFloat = 1e-8
    """Added to the root of that mean before the division by it."""
    weight_decay: NonNegativeFloat = 0.1
    """What of a parameter is taken off at each update, times the learning rate."""
    decay: Literal["matrices", "all"] = "matrices"
    """What weight decay applies to: matrices and embeddings, or every parameter, norms and biases included."""
    clip: NonNegativeFloat = 1.0
    """Largest global norm of the gradient; 0 does not clip."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then a cosine down to `final`; and the warm-up of the inner learning rate."""

    warmup_steps: CountOrZero | None = None
    """Steps of linear warm-up; None is a tenth of the run."""
    warmup_start: Literal["one_step", "zero"] = "one_step"
    """The rate of the first update: that of one step of the warm-up, or 0, with which it changes nothing."""
    final: NonNegativeFloat = 1e-5
    """The learning rate at the last step."""
    inner_start: PositiveFloat | None = None
    """What the inner learning rate is multiplied by at the first step; None is as the mixers say: 0.1 with
    TTT-MLP layers, else 1."""
    inner_warmup_steps: CountOrZero | None = None
    """Steps until that multiplier is 1; None is a tenth of the run."""


@dataclass(frozen=True)
class EvaluateConfig:
    """The held-out loss: on the way on a fixed set of batches, at the end on whole documents."""

    every: CountOrZero = 200
    """Steps between two evaluations; 0 never evaluates."""
    batches: Count = 8
    """Batches of held-out text that an evaluation on the way reads, the same each time."""
    final_bytes: CountOrZero = 2_000_000
    """Held-out text that is scored at the end of the run, whole documents of it; 0 scores none."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the whole training state is saved, and which of them are kept."""

    every: Count = 500
    """Steps between two checkpoints. The last step and an interrupted one are saved as well."""
    keep_last: Count = 2
    """The newest checkpoints that are kept."""
    keep_every: CountOrZero = 0
    """Checkpoints at multiples of this step are kept for good; 0 keeps the last ones only."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint or a line of metrics cannot be written, on a full disk for instance: stop, or go on
    without it. Earlier checkpoints stay as they are."""


@dataclass(frozen=True)
class FaultsConfig:
    """What to do about a step whose loss or gradient is not finite, or whose gradient norm spikes."""

    policy: Literal["stop", "skip", "rollback"] = "stop"
    """stop with a report; skip the step and go on; or go back to the last checkpoint and past the batches since."""
    spike: NonNegativeFloat = 0.0
    """A gradient norm this many times its running mean counts as a fault; 0 lets every finite norm pass."""
    allowed: CountOrZero = 10
    """Faults that are skipped or rolled back before the run stops after all."""


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh takes; -1, on one axis, takes all that are left."""

    data: Axis = 1
    """Replicas of the model, each with its part of the batch."""
    fsdp: Axis = -1
    """Shards of parameters and optimiser state; every shard has its part of the batch as well."""
    tensor: Axis = 1
    """Shards of heads, channels, intermediate size and vocabulary."""
    context: Axis = 1
    """Shards of the sequence; within a mixer, of its heads or channels, as many times tensor."""


@dataclass(frozen=True)
class DistributedConfig:
    """The processes that train together: one for each host with TPUs, one for each GPU (docs/cluster.md)."""

    mode: Literal["auto", "on", "off"] = "auto"
    """auto joins the processes of SLURM, Kubernetes, Open MPI and TPU pods, and trains alone where there is none of
    them; on fails if there is none; off trains alone."""
    coordinator: str | None = None
    """host:port of process 0, where nothing tells it."""
    processes: Count | None = None
    """How many processes there are, where nothing tells it."""
    process: CountOrZero | None = None
    """Which of them this one is, counted from 0, where nothing tells it."""


@dataclass(frozen=True)
class MetricsConfig:
    """Where the numbers of a run go besides `metrics.jsonl`."""

    every: Count = 1
    """Steps between two lines of metrics."""
    tensorboard: Literal["auto", "on", "off"] = "auto"
    """auto writes TensorBoard files when tensorboardX is installed."""
    wandb: str = ""
    """A Weights & Biases project to log to; empty does not."""


@dataclass(frozen=True)
class TelemetryConfig:
    """What the layers inside do, measured on the way beside the training step."""

    every: CountOrZero = 0
    """Steps between two measurements of every TTT layer: inner loss before and after the update, inner learning rate,
    norm and drift of the inner weights. Each costs about a forward pass; 0 measures nothing."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    run: OutputPath = "runs/default"
    """The folder of the run: configuration, metrics, checkpoints."""
    model: ModelConfig = field(default_factory=ModelConfig)
    init_from: FilePath = ""
    """Where the parameters start from, for fine-tuning: the folder of another run, one of its checkpoints
    (RUN/checkpoints/STEP), or a released checkpoint in the Hugging Face layout. Nothing else is taken from it; empty
    starts from random ones."""
    init_from_changes: tuple[str, ...] = ()
    """Fields of `model` that may differ from the model of `init_from`, such as rope_theta. What else computes something
    else with the same parameters is refused."""
    data: DataConfig = field(default_factory=DataConfig)
    steps: Count = 1000
    """Updates of the parameters in the whole run."""
    batch_size: Count = 16
    """Sequences in a batch, over all devices."""
    sequence_length: Count = 512
    """Tokens of a sequence."""
    accumulate: Count = 1
    """Parts that a batch is taken in, one after the other, to save memory."""
    loss_chunk: CountOrZero = 0
    """Tokens of a sequence whose logits a device holds at a time; 0 takes all that it has of the sequence."""
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
        steps = self.schedule.warmup_steps
        return self.steps // 10 if steps is None else steps

    @property
    def inner_warmup_steps(self) -> int:
        steps = self.schedule.inner_warmup_steps
        return self.steps // 10 if steps is None else steps

    @property
    def align(self) -> int:
        """Tokens on whose multiples documents start, so that they are read as if alone."""
        return self.model.alignment

    @property
    def inner_start(self) -> float:
        start = self.schedule.inner_start
        return min(mixer.inner_warmup_start for mixer in self.model.pattern) if start is None else start


MAX_BATCH_TOKENS = 2**28  # a gigabyte of ids; the largest published batches have 2**24

# A run may go on with these changed: they do not touch what is computed, or only the order and precision of its sums.
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
    """Refuses combinations that cannot work; what needs the data or the devices is checked where they are known.

    Raises:
        InputError: names the rule, what came and what to do.
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
        f"batch_size * sequence_length = {tokens:,} tokens, the largest batch has {MAX_BATCH_TOKENS:,}: lower one",
    )
    _require(
        config.batch_size % config.accumulate == 0,
        f"batch_size = {config.batch_size} is not divisible by accumulate = {config.accumulate}",
    )
    _require(
        not config.loss_chunk or config.sequence_length % config.loss_chunk == 0,
        f"sequence_length = {config.sequence_length} is not a multiple of loss_chunk = {config.loss_chunk}",
    )
    check_precision(config.model)
    _require(
        config.optimizer.name != "adam" or config.optimizer.weight_decay == 0,
        f"optimizer.name adam has no weight decay, got optimizer.weight_decay = {config.optimizer.weight_decay}: "
        "set it to 0, or name adamw",
    )
    sizes = dataclasses.asdict(config.mesh)
    _require(list(sizes.values()).count(-1) <= 1, f"only one axis of the mesh can be -1, got {sizes}")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as nested dicts and lists of plain values, ready for YAML and JSON."""
    return _plain(dataclasses.asdict(config))


def from_dict(cls: Any, values: dict[str, Any]) -> Any:
    """A configuration dataclass from what `to_dict` made of it.

    Raises:
        InputError: for a name that no field has, or a value that its field does not take.
    """
    return from_values(cls, values)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict of dotted names."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def differences(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """What keeps a run that was started with `saved` from going on with `config`, as 'name: then -> now'."""
    then, now = flat(saved), flat(to_dict(config))
    return [
        f"{name}: {then.get(name)} -> {now.get(name)}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name) and not is_free_to_change(name)
    ]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
