"""Recall tasks in a haystack of text; `tttlm.data.generated` has those of random tokens."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from tttlm.data import Tokenizer
from tttlm.data.generated import Instance
from tttlm.errors import InputError

HAYSTACK = ("passkey", "needle", "needles", "distractors")
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


def check_depths(depths: Sequence[float]) -> None:
    """Refuses invalid depths.

    Raises:
        InputError: One is not between 0 and 1.
    """
    if any(not 0 <= depth <= 1 for depth in depths):
        raise InputError(f"recall.depths lie between 0 (the start) and 1 (the end), got {list(depths)}")
