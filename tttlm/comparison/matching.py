"""Matching of models: finds the hidden size, depth or intermediate size at which a model costs as much as another."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from tttlm.errors import InputError
from tttlm.mixers import section_of
from tttlm.model import ModelConfig, parameter_count
from tttlm.ranges import NonNegativeFloat

FEED_FORWARD_STEP = 8  # intermediate sizes are multiples of this: others are slower on most devices


@dataclass(frozen=True)
class MatchConfig:
    """Configuration of the cost by which models are matched, and of the fields that may change."""

    by: Literal["none", "parameters", "flops"] = "none"
    """The cost: parameters, including embeddings, or FLOPs per token at the training length, by the model's formula."""
    to: str = ""
    """The model that the others are matched to."""
    vary: tuple[Literal["hidden_size", "num_layers", "intermediate_size"], ...] = ("hidden_size",)
    """The fields that may change. hidden_size keeps head_dim; intermediate_size stays in proportion if not named."""
    tolerance: NonNegativeFloat = 0.02
    """Largest relative difference from the target."""


@dataclass(frozen=True)
class Match:
    """A matched model.

    Attributes:
        config: the model.
        changed: differences from the configured model, such as "hidden_size 128 -> 96"; "" for none.
        cost: cost of the model, in parameters or FLOPs per token.
        miss: its cost divided by the target, minus 1.
    """

    config: ModelConfig
    changed: str
    cost: float
    miss: float


def cost_of(config: ModelConfig, by: str, sequence_length: int) -> float:
    """Number of parameters, including embeddings, or forward FLOPs per token of a sequence of that length."""
    return parameter_count(config) if by == "parameters" else config.flops_per_token(sequence_length)


def match(config: ModelConfig, target: float, settings: MatchConfig, sequence_length: int, name: str) -> Match:
    """The model nearest in shape to `config` whose cost is `target` to within the tolerance.

    Args:
        config: the configured model.
        target: parameters or FLOPs per token.
        settings: the cost that is matched, and the fields that may change.
        sequence_length: sequence length in tokens for which FLOPs are counted.
        name: the name of the model in errors.

    Raises:
        InputError: there is no such model; names the cost of the nearest one.
    """
    cost = _Cost(settings.by, sequence_length)
    best: tuple[tuple[bool, float], Match] | None = None
    for candidate in _candidates(config, target, settings.vary, cost):
        actual = cost(candidate)
        miss = actual / target - 1
        close = abs(miss) <= settings.tolerance
        rank = (not close, _distance(config, candidate) if close else abs(miss))
        if best is None or rank < best[0]:
            best = rank, Match(candidate, _changes(config, candidate), actual, miss)
    unit = "parameters" if settings.by == "parameters" else "FLOPs per token"
    problem = f"models.{name}: no {' or '.join(settings.vary)} gives {target:,.0f} {unit}"
    if best is None:
        raise InputError(f"{problem}: the model has none of these; name other fields in match.vary")
    (missed, _), nearest = best
    if missed:
        raise InputError(
            f"{problem} to within {settings.tolerance:.1%}: the nearest has {nearest.cost:,.0f} ({nearest.miss:+.1%}, "
            f"{nearest.changed or 'unchanged'}); raise match.tolerance or name more fields in match.vary"
        )
    return nearest


class _Cost:
    """`cost_of`, linear in depth and intermediate size: computed three times per hidden size, then interpolated."""

    def __init__(self, by: str, sequence_length: int) -> None:
        self._by, self._length = by, sequence_length
        self._by_shape: dict[ModelConfig, tuple[float, float, float]] = {}

    def __call__(self, config: ModelConfig) -> float:
        period = len(config.mixers)
        small = replace(
            config, num_layers=period, intermediate_size=FEED_FORWARD_STEP if config.intermediate_size else 0
        )
        if small not in self._by_shape:
            count = lambda **changes: cost_of(replace(small, **changes), self._by, self._length)
            once = count()
            wider = count(intermediate_size=2 * FEED_FORWARD_STEP) - once if config.intermediate_size else 0.0
            self._by_shape[small] = once, count(num_layers=2 * period) - once, wider / FEED_FORWARD_STEP
        once, repeat, wider = self._by_shape[small]
        repeats = config.num_layers // period
        return once + (repeats - 1) * repeat + repeats * wider * (config.intermediate_size - small.intermediate_size)


def _candidates(
    config: ModelConfig, target: float, vary: tuple[str, ...], cost: Callable[[ModelConfig], float]
) -> Iterator[ModelConfig]:
    """For every depth, the hidden sizes around the target cost, with the intermediate size that meets it."""
    period = len(config.mixers)
    depths = range(period, 4 * config.num_layers + 1, period) if "num_layers" in vary else [config.num_layers]
    for num_layers in depths:
        deep = replace(config, num_layers=num_layers)
        for wide in _hidden_sizes(deep, target, cost) if "hidden_size" in vary else [deep]:
            yield wide
            if "intermediate_size" in vary and config.intermediate_size:
                one, two = (cost(replace(wide, intermediate_size=n * FEED_FORWARD_STEP)) for n in (1, 2))
                steps = 1 + round((target - one) / (two - one))
                if steps >= 1:
                    yield replace(wide, intermediate_size=steps * FEED_FORWARD_STEP)


def _hidden_sizes(config: ModelConfig, target: float, cost: Callable[[ModelConfig], float]) -> list[ModelConfig]:
    """The models with hidden sizes just below and above the target cost, and the next ones: cost grows with size."""
    unit = hidden_size_unit(config)
    low, high = 1, max(2, 4 * config.hidden_size // unit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(with_hidden_size(config, middle * unit)) <= target else (low, middle)
    return [with_hidden_size(config, n * unit) for n in (low - 1, low, high, high + 1) if n > 0]


def hidden_size_unit(config: ModelConfig) -> int:
    """The unit of hidden sizes, which keeps head_dim."""
    return math.lcm(4, *(mixer.hidden_size_unit for mixer in config.pattern))


def with_hidden_size(config: ModelConfig, hidden_size: int) -> ModelConfig:
    """The model with another hidden size: head_dim is kept, intermediate_size stays in proportion."""
    ratio = hidden_size / config.hidden_size
    intermediate_size = max(1, round(config.intermediate_size * ratio / FEED_FORWARD_STEP)) * FEED_FORWARD_STEP
    num_heads, rest = divmod(hidden_size * config.num_heads, config.hidden_size)
    if rest or any(mixer.keeps_num_heads for mixer in config.pattern):
        num_heads = config.num_heads
    return config.with_mixer_configs(
        {section_of(mixer.name): mixer.with_num_heads(num_heads) for mixer in config.pattern},
        hidden_size=hidden_size,
        num_heads=num_heads,
        intermediate_size=intermediate_size if config.intermediate_size else 0,
    )


def _distance(a: ModelConfig, b: ModelConfig) -> float:
    """The distance of two shapes, in log ratios; depth counts twice, because it changes the most."""
    shape = lambda c: (c.hidden_size, c.num_layers, c.num_layers, max(c.intermediate_size, 1) / c.hidden_size)
    return sum(abs(math.log(x / y)) for x, y in zip(shape(a), shape(b), strict=True))


def _changes(a: ModelConfig, b: ModelConfig) -> str:
    names = ("num_layers", "hidden_size", "num_heads", "intermediate_size")
    pairs = ((name, getattr(a, name), getattr(b, name)) for name in names)
    return ", ".join(f"{name} {x} -> {y}" for name, x, y in pairs if x != y)
