"""A run scored while it learns from what it reads: dynamic evaluation of held-out text and of text files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tttlm.adaptation.language_model import DynamicConfig, DynamicEvaluation
from tttlm.data import encode_file
from tttlm.evaluation.loss import Score
from tttlm.evaluation.run import Run
from tttlm.progress import progress_bar

Documents = Sequence[tuple[np.ndarray, int]]  # tokens of each document, and the bytes of text they stand for


def held_out(run: Run, limit: int = 0) -> Documents:
    """The held-out documents of a run, until `limit` bytes; 0 gives all."""
    return [(document.tokens, document.bytes) for document in run.held_out(limit)]


def text_file(run: Run, path: Path) -> Documents:
    """A text file as one document."""
    pieces = list(encode_file(path, run.tokenizer()))
    return [(np.concatenate([tokens for tokens, _ in pieces]), sum(size for _, size in pieces))]


def score_learning(run: Run, documents: Documents, config: DynamicConfig) -> Score:
    """The score of documents by a model that learns from each stretch after it was scored; shows a progress bar.

    Raises:
        InputError: the settings do not fit the model.
    """
    longest = max(len(tokens) for tokens, _ in documents)
    evaluation = DynamicEvaluation(run.with_room_for(longest + config.stretch), config)
    total = sum(max(len(tokens) - 1, 0) for tokens, _ in documents)
    with progress_bar(total, "scoring and learning", unit="token") as bar:
        found = evaluation([tokens for tokens, _ in documents], on_tokens=bar.update)
    return Score(found.nats, found.tokens, sum(size for _, size in documents))
