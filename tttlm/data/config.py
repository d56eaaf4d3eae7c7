"""What a person can set about data: where text comes from, how it becomes tokens, how tokens become batches."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tttlm.errors import InputError
from tttlm.fields import check_fields
from tttlm.ranges import FilePath, PositiveFloat, Range

_FORMATS = ("json", "csv", "parquet", "arrow", "text", "xml")  # datasets that without files would be all files here


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset that `datasets.load_dataset` can name; used when `name` is set."""

    name: str = ""
    """What `load_dataset` is called with: a dataset of the hub, a local folder, or "json", "parquet", "text"."""
    config: str = ""
    """The configuration ("subset") of the dataset, e.g. sample-10BT."""
    split: str = "train"
    """Which split of the dataset is read; both of our splits are made from it."""
    data_files: tuple[FilePath, ...] = ()
    """Files or globs for "json", "parquet" and "text"."""
    revision: str = ""
    """A commit, tag or branch of the dataset."""
    streaming: bool = True
    """Whether the dataset is read while it is downloaded; False downloads all of it first."""


@dataclass(frozen=True)
class PrepareConfig:
    """How text becomes a folder of tokens: its configuration. Only `workers` depends on the machine."""

    source: tuple[FilePath, ...] = ()
    """Files, folders or globs; .gz, .zst, .xz and .bz2 are unpacked. "stdlib" is Python's own standard library."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """What the files hold; "auto" goes by the file name: .jsonl, .ndjson, .json, .parquet, anything else is text."""
    column: str = "text"
    """Which field of a JSON line, a Parquet row or a dataset's record holds the text."""
    dataset: DatasetConfig = DatasetConfig()
    """A dataset to read instead of `source`."""
    tokenizer: FilePath = "train"
    """A SentencePiece .model, a tokenizer.json, a folder holding either, "bytes", or "train" for one made here."""
    vocab_size: Annotated[int, Range(least=1, most=1 << 24)] = 32_000
    """Pieces of the tokenizer that "train" makes."""
    sample_mb: Annotated[float, Range(above=0, most=1e6)] = 100.0
    """Megabytes of the training documents that "train" looks at."""
    bos: bool = False
    """Whether every document begins with the tokenizer's BOS."""
    eos: bool = True
    """Whether every document ends with the tokenizer's EOS."""
    bos_token: str = ""
    """Which token of the tokenizer is BOS, where its own files do not say so or name another."""
    eos_token: str = ""
    """Which token of the tokenizer is EOS, where its own files do not say so or name another."""
    held_out: Annotated[float, Range(least=0, most=1)] = 0.01
    """Fraction of the documents that is kept for validation, chosen by their content alone; of a single text file, the
    fraction at its end."""
    max_file_bytes: Annotated[int, Range(least=0, most=1 << 62)] = 0
    """Size above which text files are passed over; 0: none is."""
    shard_mb: Annotated[float, Range(above=0, most=1e6)] = 256.0
    """Megabytes of text a shard holds (one document is never cut)."""
    invalid_utf8: Literal["replace", "skip", "fail"] = "replace"
    """What becomes of a document with invalid UTF-8: wrong bytes become U+FFFD, it is left out, or prepare stops."""
    workers: Annotated[int, Range(least=0, most=1024)] = 0
    """Processes that tokenize; 0: one per core this process may use."""

    def __post_init__(self) -> None:
        if isinstance(self.source, str):  # a single name is easily written without its tuple
            object.__setattr__(self, "source", (self.source,))

    @property
    def given(self) -> bool:
        """Tells whether there is anything to prepare from."""
        return bool(self.source or self.dataset.name)

    def validate(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            InputError: names the field and what came.
        """
        check_fields(self)
        if not self.given:
            raise InputError("nothing to prepare: name files, a folder, a glob, a dataset, or 'stdlib'")
        if "" in self.source:
            raise InputError("an empty name among the sources; '.' is the folder you are in")
        if self.source and self.dataset.name:
            raise InputError(
                f"both files ({self.source[0]}) and a dataset ({self.dataset.name}) were named; name one of them"
            )
        if self.dataset.name in _FORMATS and not self.dataset.data_files:
            raise InputError(f"dataset {self.dataset.name!r} is a format: name its files with dataset.data_files")
        if "stdlib" in self.source and len(self.source) > 1:
            raise InputError("'stdlib' cannot be joined with other sources; prepare it by itself and mix the folders")
        if self.vocab_size < 300 and self.tokenizer == "train":
            raise InputError(
                f"vocab_size {self.vocab_size} is too small: 256 bytes and 4 controls come on top; try 1000"
            )
        if self.tokenizer in ("train", "bytes") and (given := self.bos_token or self.eos_token):
            raise InputError(
                f"the token {given!r} was named as BOS or EOS, but tokenizer {self.tokenizer!r} brings its own; "
                "leave bos_token and eos_token empty"
            )


@dataclass(frozen=True)
class DataConfig:
    """The configuration of where the tokens are and how they are cut into batches."""

    path: FilePath = ""
    """A folder that `python -m tttlm.cli.prepare` wrote."""
    mixture: dict[FilePath, PositiveFloat] = field(default_factory=dict)
    """Several such folders and their weights, instead of `path`; examples are drawn in proportion to the weights."""
    validation_path: FilePath = ""
    """Another folder whose held-out documents are the validation split."""
    layout: Literal["windows", "packed", "documents"] = "windows"
    """windows: documents joined and cut; packed: whole documents side by side; documents: one after another at each
    position of the batch, with the state carried from step to step."""
    tokenizer: str = ""
    """The tokenizer the tokens must have been made with; refused when they were not."""
    prepare: PrepareConfig = PrepareConfig()
    """When `path` does not exist yet and a source is named here, it is prepared there first."""

    def validate(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            InputError: names the field and what came.
        """
        check_fields(self)
        if bool(self.path) == bool(self.mixture):
            raise InputError(
                "name the data by either path (one prepared folder) or mixture (several), not both or none"
            )
        if len(self.mixture) > 1000:
            raise InputError(f"a mixture of {len(self.mixture)} folders; at most 1000 are drawn from in proportion")
        if self.mixture and self.prepare.given:
            raise InputError("prepare goes with path; prepare the folders of a mixture one by one beforehand")
