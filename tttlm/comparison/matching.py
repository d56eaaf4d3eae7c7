"""Models of one cost: finds the width, depth or feed-forward width with which a model costs what another one does."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from tttlm.errors import InputError
from tttlm.mixers import section_of
from tttlm.model import ModelConfig, parameter_count
from tttlm.ranges import NonNegativeFloat

FEED_FORWARD_STEP = 8  # widths in between gain nothing and are slower on most devices


@dataclass(frozen=True)
class MatchConfig:
    """Which cost the models of a comparison share, and what of them may be changed to reach it."""

    by: Literal["none", "parameters", "flops"] = "none"
    """parameters, embeddings included, or FLOPs of a token at the training length, by the model's own formula."""
    to: str = ""
    """The model that the others are matched to."""
    vary: tuple[Literal["hidden_size", "num_layers", "intermediate_size"], ...] = ("hidden_size",)
    """What may be changed. hidden_size keeps head_dim; intermediate_size stays in proportion where it is not named."""
    tolerance: NonNegativeFloat = 0.02
    """Largest relative difference from the target."""


@dataclass(frozen=True)
class Match:
    """A model that was picked.

    Attributes:
        config: the model.
        changed: what differs from the model that was asked for, such as "width 128 -> 96"; empty for nothing.
        cost: of the model, in parameters or FLOPs of a token.
        miss: its cost over the target, minus 1.
    """

    config: ModelConfig
    changed: str
    cost: float
    miss: float


def cost_of(config: ModelConfig, by: str, sequence_length: int) -> float:
    """Parameters, embeddings included, or forward FLOPs of a token of a sequence of that length."""
    return parameter_count(config) if by == "parameters" else config.flops_per_token(sequence_length)


def match(config: ModelConfig, target: float, settings: MatchConfig, sequence_length: int, name: str) -> Match:
    """The model nearest in shape to `config` whose cost is `target` to within the tolerance.

    Args:
        config: the model as asked for; `name` is what it is called in an error.
        target: parameters or FLOPs of a token.
        settings: what the target counts, and what may be changed.
        sequence_length: of the rows that FLOPs are counted for.

    Raises:
        InputError: there is none; says what the nearest one costs.
    """
    cost = _Cost(settings.by, sequence_length)
    best: tuple[tuple[bool, float], Match] | None = None
    for candidate in _candidates(config, target, settings.vary, cost):
        came = cost(candidate)
        miss = came / target - 1
        close = abs(miss) <= settings.tolerance
        rank = (not close, _distance(config, candidate) if close else abs(miss))
        if best is None or rank < best[0]:
            best = rank, Match(candidate, _changes(config, candidate), came, miss)
    unit = "parameters" if settings.by == "parameters" else "FLOPs a token"
    asked = f"models.{name}: no {' or '.join(settings.vary)} gives {target:,.0f} {unit}"
    if best is None:
        raise InputError(f"{asked}: there is nothing to vary; name another match.vary")
    (missed, _), found = best
    if missed:
        raise InputError(
            f"{asked} to within {settings.tolerance:.1%}: the nearest has {found.cost:,.0f} ({found.miss:+.1%}, "
            f"{found.changed or 'unchanged'}); raise match.tolerance or let match.vary name more"
        )
    return found


class _Cost:
    """`cost_of`, linear in depth and in feed-forward width: counted three times for every width, then interpolated."""

    def __init__(self, by: str, sequence_length: int) -> None:
        self._by, self._length = by, sequence_length
        self._of_width: dict[ModelConfig, tuple[float, float, float]] = {}

    def __call__(self, config: ModelConfig) -> float:
        period = len(config.mixers)
        thin = replace(
            config, num_layers=period, intermediate_size=FEED_FORWARD_STEP if config.intermediate_size else 0
        )
        if thin not in self._of_width:
            count = lambda **changes: cost_of(replace(thin, **changes), self._by, self._length)
            once = count()
            wider = count(intermediate_size=2 * FEED_FORWARD_STEP) - once if config.intermediate_size else 0.0
            self._of_width[thin] = once, count(num_layers=2 * period) - once, wider / FEED_FORWARD_STEP
        once, repeat, wider = self._of_width[thin]
        repeats = config.num_layers // period
        return once + (repeats - 1) * repeat + repeats * wider * (config.intermediate_size - thin.intermediate_size)


def _candidates(
    config: ModelConfig, target: float, vary: tuple[str, ...], cost: Callable[[ModelConfig], float]
) -> Iterator[ModelConfig]:
    """Around the target: for every depth, the widths on both sides of it and the feed-forward width that meets it."""
    period = len(config.mixers)
    depths = range(period, 4 * config.num_layers + 1, period) if "num_layers" in vary else [config.num_layers]
    for num_layers in depths:
        deep = replace(config, num_layers=num_layers)
        for wide in _widths(deep, target, cost) if "hidden_size" in vary else [deep]:
            yield wide
            if "intermediate_size" in vary and config.intermediate_size:
                one, two = (cost(replace(wide, intermediate_size=n * FEED_FORWARD_STEP)) for n in (1, 2))
                steps = 1 + round((target - one) / (two - one))
                if steps >= 1:
                    yield replace(wide, intermediate_size=steps * FEED_FORWARD_STEP)


def _widths(config: ModelConfig, target: float, cost: Callable[[ModelConfig], float]) -> list[ModelConfig]:
    """The two models on both sides of the target, and the next ones: cost grows with the width."""
    unit = width_unit(config)
    low, high = 1, max(2, 4 * config.hidden_size // unit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(with_width(config, middle * unit)) <= target else (low, middle)
    return [with_width(config, n * unit) for n in (low - 1, low, high, high + 1) if n > 0]


def width_unit(config: ModelConfig) -> int:
    """Hidden sizes are multiples of this: what keeps the size of heads."""
    return math.lcm(4, *(mixer.hidden_size_unit for mixer in config.pattern))


def with_width(config: ModelConfig, hidden_size: int) -> ModelConfig:
    """The same model wider or narrower: heads as wide as before, feed-forward blocks in proportion."""
    ratio = hidden_size / config.hidden_size
    intermediate_size = max(1, round(config.intermediate_size * ratio / FEED_FORWARD_STEP)) * FEED_FORWARD_STEP
    num_heads, rest = divmod(hidden_size * config.num_heads, config.hidden_size)
    if rest or any(mixer.keeps_num_heads for mixer in config.pattern):
        num_heads = config.num_heads
    return config.with_settings(
        {section_of(mixer.name): mixer.with_num_heads(num_heads) for mixer in config.pattern},
        hidden_size=hidden_size,
        num_heads=num_heads,
        intermediate_size=intermediate_size if config.intermediate_size else 0,
    )


def _distance(a: ModelConfig, b: ModelConfig) -> float:
    """How far two shapes are from each other, in factors; depth counts twice, as it changes the most."""
    shape = lambda c: (c.hidden_size, c.num_layers, c.num_layers, max(c.intermediate_size, 1) / c.hidden_size)
    return sum(abs(math.log(x / y)) for x, y in zip(shape(a), shape(b), strict=True))


def _changes(a: ModelConfig, b: ModelConfig) -> str:
    names = ("num_layers", "hidden_size", "num_heads", "intermediate_size")
    pairs = ((name, getattr(a, name), getattr(b, name)) for name in names)
    return ", ".join(f"{name} {x} -> {y}" for name, x, y in pairs if x != y)
