"""A trained model at work: prompts read in chunks, tokens drawn and streamed as text, states kept, documents scored."""

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
