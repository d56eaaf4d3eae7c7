"""Inference with a trained model: reading prompts in chunks, sampling, streaming, saved states, and scoring."""

from tttlm.inference.generation import Generation, Piece, generate, stream
from tttlm.inference.reading import Reading, begin, read, with_room_for
from tttlm.inference.sampling import Sampling
from tttlm.inference.saved_state import load_reading, save_reading
from tttlm.inference.scoring import Losses, stream_losses

__all__ = [
    "Generation",
    "Losses",
    "Piece",
    "Reading",
    "Sampling",
    "begin",
    "generate",
    "load_reading",
    "read",
    "save_reading",
    "stream",
    "stream_losses",
    "with_room_for",
]
