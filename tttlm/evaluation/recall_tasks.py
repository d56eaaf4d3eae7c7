"""Recall tasks: retrieval from a haystack of text, or from synthetic sequences."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from tttlm.data import Tokenizer
from tttlm.errors import InputError

HAYSTACK = ("passkey", "needle", "needles", "distractors")
MADE = ("mqar", "copy")
SEVERAL = 4
_KEYS = (
    *(
        "apple",
        "river",
        "stone",
        "cloud",
        "horse",
        "garden",
        "window",
        "candle",
        "mirror",
        "bridge",
        "forest",
        "silver",
    ),
    *("winter", "button", "ladder", "pocket", "hammer", "island", "needle", "orange", "pencil", "ribbon", "saddle"),
)


@dataclass(frozen=True)
class Instance:
    """One sequence with answers in it.

    Attributes:
        tokens: The sequence, including answers; the first token is not predicted.
        answers: (start, stop) of each answer: `tokens[start:stop]`.
    """

    tokens: Int[np.ndarray, "T"]
    answers: tuple[tuple[int, int], ...]


def in_haystack(
    task: str,
    haystack: Int[np.ndarray, "N"],
    tokenizer: Tokenizer,
    *,
    length: int,
    depth: float,
    rng: np.random.Generator,
) -> Instance:
    """A text with a needle in it, and the question for it at the end.

    `passkey`: a number, as in arXiv 2305.16300. `needle`: the number of a key. `needles`: four of them, all asked for
    in turn; the first is at `depth`, the others anywhere. `distractors`: one, among four that are not asked for.

    Args:
        task: One of `HAYSTACK`.
        haystack: Tokens of text, of which a random segment is used.
        tokenizer: The tokenizer of the model.
        length: Number of tokens of the sequence, including the question and the answers.
        depth: Relative position of the first needle in the haystack, from 0 to 1.
        rng: Random generator of the segment, the keys and the numbers.

    Raises:
        InputError: Needles and questions are longer than `length`, or the haystack is too short.
    """
    keys = rng.permutation(len(_KEYS))[: 1 + (SEVERAL if task == "distractors" else SEVERAL - 1)]
    numbers = [f"{rng.integers(10_000, 100_000)}" for _ in keys]
    if task == "passkey":
        said, asked = [f" The pass key is {numbers[0]}. Remember it."], [" What is the pass key? The pass key is"]
        numbers = numbers[:1]
    else:
        wanted = SEVERAL if task == "needles" else 1
        written = 1 if task == "needle" else len(keys)
        said = [f" The number of {_KEYS[k]} is {n}." for k, n in zip(keys, numbers, strict=True)][:written]
        asked = [f" The number of {_KEYS[k]} is" for k in keys[:wanted]]
        numbers = numbers[:wanted]
    needles = [tokenizer.encode(text) for text in said]
    tail: list[int] = []
    answers: list[tuple[int, int]] = []
    for question, number in zip(asked, numbers, strict=True):
        before, whole = tokenizer.encode(question), tokenizer.encode(f"{question} {number}")
        if whole[: len(before)] != before:  # the tokenizer merges across the end of the question
            before = whole[: next(i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b)]
        answers.append((len(tail) + len(before), len(tail) + len(whole)))
        tail += [*whole, *tokenizer.encode(".")]
    del tail[answers[-1][1] :]
    entry = [] if tokenizer.entry_id is None else [tokenizer.entry_id]
    room = length - len(entry) - len(tail) - sum(map(len, needles))
    if room < len(needles):
        raise InputError(f"{task} takes more than the {length} tokens of --recall.lengths: raise it")
    if len(haystack) < room:
        raise InputError(
            f"the texts have {len(haystack):,} tokens, fewer than a haystack of {room:,} takes: name more --text, or "
            "lower --recall.lengths"
        )
    start = int(rng.integers(0, len(haystack) - room + 1))
    hay = haystack[start : start + room]
    places = [round(depth * room), *sorted(rng.integers(0, room + 1, len(needles) - 1).tolist())]
    parts, last = [np.asarray(entry, np.int64)], 0
    for place, needle in sorted(zip(places, needles, strict=True)):
        parts += [hay[last:place], np.asarray(needle)]
        last = place
    context = np.concatenate([*parts, hay[last:]])
    found = tuple((len(context) + a, len(context) + b) for a, b in answers)
    return Instance(np.concatenate([context, tail]).astype(np.int64), found)


def mqar(num_pairs: int, vocab_size: int, rng: np.random.Generator, *, length: int = 0) -> Instance:
    """Multi-query associative recall (arXiv 2312.04927): pairs of a key and a value, then every key again, in turn.

    Args:
        num_pairs: Number of pairs; keys are from the first half of the vocabulary, values from the second.
        vocab_size: Number of tokens to draw from; token 0 is the first token and the filler.
        rng: Random generator of keys, values and order.
        length: Number of tokens of the sequence, filled between pairs and questions; 0 adds no filler.

    Raises:
        InputError: There are fewer keys, or the pairs do not fit in the length.
    """
    half = vocab_size // 2
    if num_pairs >= half:
        raise InputError(
            f"{num_pairs} pairs need more than {2 * num_pairs} tokens of vocabulary, there are {vocab_size}"
        )
    keys = rng.choice(np.arange(1, half), num_pairs, replace=False)
    values = rng.integers(half, vocab_size, num_pairs)
    order = rng.permutation(num_pairs)
    pairs = np.stack([keys, values], axis=1)
    fill = length - 1 - 4 * num_pairs if length else 0
    if fill < 0:
        raise InputError(
            f"{num_pairs} pairs and their questions take {1 + 4 * num_pairs} tokens, got a length of {length}"
        )
    tokens = np.concatenate([[0], pairs.ravel(), np.zeros(fill, np.int64), pairs[order].ravel()])
    first = 1 + 2 * num_pairs + fill
    return Instance(tokens.astype(np.int64), tuple((first + 2 * n + 1, first + 2 * n + 2) for n in range(num_pairs)))


def copy(num_tokens: int, vocab_size: int, rng: np.random.Generator) -> Instance:
    """Random tokens, token 0, and the same tokens again: all but the first of them are the answer.

    Args:
        num_tokens: Number of tokens to copy.
        vocab_size: Number of tokens to draw from.
        rng: Random generator of the tokens, which are distinct if there are enough.
    """
    if num_tokens < vocab_size:
        said = rng.choice(np.arange(1, vocab_size), num_tokens, replace=False)
    else:
        said = rng.integers(1, vocab_size, num_tokens)
    tokens = np.concatenate([[0], said, [0], said]).astype(np.int64)
    return Instance(tokens, ((num_tokens + 2, len(tokens)),))


def check_depths(depths: Sequence[float]) -> None:
    """Refuses invalid depths.

    Raises:
        InputError: One is not between 0 and 1.
    """
    if any(not 0 <= depth <= 1 for depth in depths):
        raise InputError(f"recall.depths lie between 0 (the start) and 1 (the end), got {list(depths)}")
