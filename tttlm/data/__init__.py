"""Text to tokens on disk, and tokens to batches.

`prepare` turns text into a folder of memory-mapped tokens; `open_data` makes batches of such folders, as a function of
the seed and the step alone. Importing this package imports neither JAX nor grain.
"""

from tttlm.data.batch import Batch
from tttlm.data.config import DataConfig, DatasetConfig, PrepareConfig
from tttlm.data.held_out import Document, encode_file, held_out_documents
from tttlm.data.loader import Loader, open_data
from tttlm.data.preparation import prepare
from tttlm.data.tokenizer import Tokenizer
from tttlm.data.tokenizer_files import load_tokenizer, save_tokenizer

__all__ = [
    "Batch",
    "DataConfig",
    "DatasetConfig",
    "Document",
    "Loader",
    "PrepareConfig",
    "Tokenizer",
    "encode_file",
    "held_out_documents",
    "load_tokenizer",
    "open_data",
    "prepare",
    "save_tokenizer",
]
