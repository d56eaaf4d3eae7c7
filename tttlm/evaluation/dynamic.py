"""Dynamic evaluation of documents: a model is scored while it learns from them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from tttlm.adaptation.language_model import DynamicConfig, DynamicEvaluation
from tttlm.inference import with_room_for
from tttlm.model import LanguageModel
from tttlm.progress import progress_bar


def score_learning(
    model: LanguageModel, documents: Sequence[Int[np.ndarray, "T"]], config: DynamicConfig, *, description: str
) -> list[float]:
    """Summed losses of documents by a model that learns from each stretch after it was scored; shows a progress bar.

    Args:
        model: The model; caches of attention get room for the longest document.
        documents: Tokens of each document, read in order.
        config: Configuration of dynamic evaluation.
        description: Label of the progress bar.

    Raises:
        InputError: The configuration does not match the model.
    """
    longest = max(len(tokens) for tokens in documents)
    evaluation = DynamicEvaluation(with_room_for(model, longest + config.stretch), config)
    total = sum(max(len(tokens) - 1, 0) for tokens in documents)
    with progress_bar(total, description, unit="token") as bar:
        found = evaluation(documents, on_tokens=bar.update)
    return [float(losses.sum(dtype=np.float64)) for losses in found.losses]
