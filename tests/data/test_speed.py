"""How fast data is prepared and read. Times are CPU seconds, so that other work on the machine does not show."""

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tttlm.data import DataConfig, PrepareConfig, load_tokenizer, open_data, prepare
from tttlm.data.packing import Packed
from tttlm.data.sources import open_source

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The standard library, with a tokenizer of 4,096 pieces trained on it."""
    folder = tmp_path_factory.mktemp("speed") / "stdlib"
    prepare(PrepareConfig(source="stdlib", vocab_size=4_096, sample_mb=4.0, held_out=0.05), folder)
    return folder


def standard_library() -> Iterator[str]:
    for document in open_source(PrepareConfig(source="stdlib")).documents():
        yield b"".join(document.chunks).decode(errors="replace")


def cpu_seconds() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def test_preparing_is_no_slower_than_the_tokenizer_alone(library, tmp_path):
    """Per core, over all processes and everything they do: at least 0.8 of the bare tokenizer, document by document."""
    tokenizer = load_tokenizer(library)
    texts = list(standard_library())
    source = tmp_path / "texts"
    source.mkdir()
    for i, text in enumerate(texts):
        (source / f"{i:04d}.txt").write_text(text)
    size = sum(path.stat().st_size for path in source.iterdir())
    assert size > 10e6
    begin = cpu_seconds()
    for text in texts:
        np.array(tokenizer._model.encode(text), np.uint16)  # type: ignore[attr-defined]
    alone = size / (cpu_seconds() - begin) / 1e6
    begin = cpu_seconds()
    prepare(PrepareConfig(source=(str(source),), tokenizer=str(library), workers=2), tmp_path / "data")
    whole = size / (cpu_seconds() - begin) / 1e6
    print(f"\nprepare {whole:.2f} MB per CPU second, the tokenizer alone {alone:.2f}: {whole / alone:.2f} of it")
    assert whole > 0.8 * alone


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [("windows", 2e6), ("packed", 1e6), ("documents", 1e6)],
    ids=["windows", "packed", "documents"],
)
@pytest.mark.parametrize("length", [256, 2048])
def test_tokens_a_second_on_one_core(library, layout, wanted, length):
    config = DataConfig(path=str(library), layout=layout)
    loader = open_data(config, split="train", batch_size=32, sequence_length=length, align=16)
    loader[0]
    begin = time.process_time()
    for step in range(60):
        loader[step]
    speed = 60 * 32 * length / (time.process_time() - begin)
    print(
        f"\n{layout}, examples of {length}: {speed / 1e6:.1f} million tokens per CPU second, {loader.fill:.2%} filled"
    )
    assert speed > wanted


def test_a_million_documents_are_packed_in_seconds():
    class Many:
        positions = np.maximum(np.random.default_rng(0).lognormal(6.4, 1.0, 1_000_000), 2).astype(np.int64)

    begin = time.process_time()
    packed = Packed(Many(), 2048, 16, seed=0)  # type: ignore[arg-type]
    seconds = time.process_time() - begin
    print(f"\n1,000,000 documents of the web packed in {seconds:.1f} s, {packed.fill:.2%} filled")
    assert seconds < 5
    assert packed.fill > 0.97


CORPUS = Path(__file__).parents[3] / "shared"


@pytest.mark.skipif(not (CORPUS / "corpus").exists(), reason="the books of ../shared are not here")
def test_books_pack_without_loss(tmp_path):
    tokenizer = str(CORPUS / "tokenizer" / "mistral_v1.model")
    prepare(
        PrepareConfig(source=(str(CORPUS / "corpus" / "dev"),), tokenizer=tokenizer, held_out=0.0), tmp_path / "data"
    )
    for length in (2048, 8192):
        config = DataConfig(path=str(tmp_path / "data"), layout="packed")
        loader = open_data(config, split="train", batch_size=2, sequence_length=length, align=16)
        print(f"\nfour novels in examples of {length}: {loader.fill:.2%} filled")
        assert loader.fill > 0.97
