"""Small texts, tokenizers and prepared folders that the data tests share."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.small import make_text, small_config
from tttlm.data import prepare
from tttlm.data.tokenizer import SentencePieceTokenizer, train_tokenizer


@pytest.fixture(scope="session")
def sentencepiece_model() -> SentencePieceTokenizer:
    return train_tokenizer((make_text(seed, 2_000) for seed in range(8)), 600)


@pytest.fixture(scope="session")
def sentencepiece_file(sentencepiece_model: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(sentencepiece_model.file_bytes)
    return path


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Sixty documents, from two words to a few hundred."""
    rng = random.Random(7)
    return [make_text(100 + i, int(rng.lognormvariate(5, 1.0)) + 2) for i in range(60)]


@pytest.fixture(scope="session")
def text_folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def prepared(text_folder: Path, sentencepiece_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sixty documents in several shards, a fifth of them held out. Read only."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(small_config(text_folder, sentencepiece_file), folder)
    return folder


@pytest.fixture
def altered(prepared: Path, tmp_path: Path) -> Callable[[str, Callable[[bytes], bytes]], Path]:
    """Copies the prepared folder with one file changed."""

    def change(name: str, edit: Callable[[bytes], bytes]) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(prepared, folder)
        (folder / name).write_bytes(edit((folder / name).read_bytes()))
        return folder

    return change
