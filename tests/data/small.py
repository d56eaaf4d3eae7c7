"""Small texts and prepared folders for the data tests."""

import io
import random
from pathlib import Path

import sentencepiece

from tttlm.data import PrepareConfig
from tttlm.data.tokenizer import SentencePieceTokenizer

WORDS = [
    *("the", "state", "of", "a", "layer", "is", "model", "whose", "update", "step", "descends", "loss", "and", "reads"),
    *("def", "return", "self", "value", "for", "in", "range", "print", "None", "True", "import", "class", "lambda"),
    *("1917", "42", "3.14", "naïve", "café", "straße", "λόγος", "здравствуй", "世界", "模型", "🙂", "don't", "it's"),
]


def make_text(seed: int, words: int) -> str:
    """Text with punctuation, indentation, blank lines, several scripts; the same for the same seed."""
    rng = random.Random(seed)
    pieces = []
    for _ in range(words):
        pieces.append(rng.choice(WORDS))
        pieces.append(
            rng.choices(
                [" ", "  ", "\n", ".\n", ",\n    ", "\n\n", ". ", "; ", "\t", "。\n"], [60, 2, 6, 6, 6, 3, 8, 5, 1, 4]
            )[0]
        )
    return "".join(pieces)


def sentencepiece_of(kind: str, rule: str, *, prefix: bool, trim: bool) -> SentencePieceTokenizer:
    """A SentencePiece model of another kind than those made by `train_tokenizer`."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for seed in range(4) for line in make_text(seed, 1_000).splitlines()),
        model_writer=out,
        model_type=kind,
        vocab_size=340,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name=rule,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=trim,
        minloglevel=2,
    )
    return SentencePieceTokenizer(out.getvalue())


def small_config(source: Path | str, tokenizer: Path | str, /, **changes: object) -> PrepareConfig:
    """Shards of a few kilobytes, tokenized in this process."""
    settings = {"source": (str(source),), "tokenizer": str(tokenizer), "held_out": 0.2, "shard_mb": 0.01, "workers": 1}
    return PrepareConfig(**{**settings, **changes})  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared folder except what belongs to this machine (lock, times of change)."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
