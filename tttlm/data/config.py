"""Configuration of data: where text comes from, how it becomes tokens, how tokens become batches."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tttlm.errors import InputError
from tttlm.fields import check_fields, refuse_unused
from tttlm.ranges import FilePath, PositiveFloat, Range

_FORMATS = ("json", "csv", "parquet", "arrow", "text", "xml")  # without data_files they read the current folder


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset that `datasets.load_dataset` can name; used when `name` is set."""

    name: str = ""
    """The name passed to `load_dataset`: a dataset of the hub, a local folder, or "json", "parquet", "text"."""
    config: str = ""
    """The configuration ("subset") of the dataset, e.g. sample-10BT."""
    split: str = "train"
    """The split of the dataset that is read; both of our splits are made from it."""
    data_files: tuple[FilePath, ...] = ()
    """Files or globs for "json", "parquet" and "text"."""
    revision: str = ""
    """A commit, tag or branch of the dataset."""
    streaming: bool = True
    """Whether the dataset is read while it is downloaded; False downloads all of it first."""


@dataclass(frozen=True)
class PrepareConfig:
    """Configuration of `prepare`, which turns text into tokens on disk. Only `workers` does not affect the result."""

    source: tuple[FilePath, ...] = ()
    """Files, folders or globs; .gz, .zst, .xz and .bz2 are decompressed. "stdlib" is Python's own standard library."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """Format of the files; "auto" goes by the file name: .jsonl, .ndjson, .json, .parquet, anything else is text."""
    column: str = "text"
    """The field of a JSON line, a Parquet row or a dataset's record that holds the text."""
    dataset: DatasetConfig = DatasetConfig()
    """A dataset to read instead of `source`."""
    tokenizer: FilePath = "train"
    """A SentencePiece .model, a tokenizer.json, a folder with either, "bytes", or "train" to train one here."""
    vocab_size: Annotated[int, Range(least=1, most=1 << 24)] = 32_000
    """Number of pieces of the tokenizer that "train" makes."""
    sample_mb: Annotated[float, Range(above=0, most=1e6)] = 100.0
    """Megabytes of the training documents that "train" uses."""
    bos: bool = False
    """Whether every document begins with the tokenizer's BOS."""
    eos: bool = True
    """Whether every document ends with the tokenizer's EOS."""
    bos_token: str = ""
    """The token used as BOS, if the tokenizer's own files name none or another."""
    eos_token: str = ""
    """The token used as EOS, if the tokenizer's own files name none or another."""
    held_out: Annotated[float, Range(least=0, most=1)] = 0.01
    """Fraction of the documents held out for validation, chosen by their content alone; of a single text file, the
    fraction at its end."""
    max_file_bytes: Annotated[int, Range(least=0, most=1 << 62)] = 0
    """Size in bytes above which text files are skipped; 0 skips none."""
    shard_mb: Annotated[float, Range(above=0, most=1e6)] = 256.0
    """Megabytes of text in a shard (a document is never split over shards)."""
    invalid_utf8: Literal["replace", "skip", "fail"] = "replace"
    """Handling of a document with invalid UTF-8: invalid bytes become U+FFFD, it is skipped, or prepare fails."""
    workers: Annotated[int, Range(least=0, most=1024)] = 0
    """Number of processes that tokenize; 0: one per core this process may use."""

    def __post_init__(self) -> None:
        if isinstance(self.source, str):  # a single name is easily written without its tuple
            object.__setattr__(self, "source", (self.source,))

    @property
    def given(self) -> bool:
        """Whether a source is configured."""
        return bool(self.source or self.dataset.name)

    def validate(self) -> None:
        """Refuses contradictory fields.

        Raises:
            InputError: names the field and its value.
        """
        check_fields(self)
        if not self.given:
            raise InputError("nothing to prepare: name files, a folder, a glob, a dataset, or 'stdlib'")
        if "" in self.source:
            raise InputError("an empty name among the sources; '.' is the current folder")
        if self.source and self.dataset.name:
            raise InputError(
                f"both files ({self.source[0]}) and a dataset ({self.dataset.name}) were named; name one of them"
            )
        if not self.dataset.name:
            refuse_unused(self, "without dataset.name", "dataset")
        else:
            refuse_unused(self, "for a dataset", "format", "max_file_bytes")
        if self.dataset.name in _FORMATS and not self.dataset.data_files:
            raise InputError(f"dataset {self.dataset.name!r} is a format: name its files with dataset.data_files")
        if "stdlib" in self.source and len(self.source) > 1:
            raise InputError("'stdlib' cannot be combined with other sources; prepare it by itself and mix the folders")
        if self.vocab_size < 300 and self.tokenizer == "train":
            raise InputError(
                f"vocab_size {self.vocab_size} is too small: it includes 256 bytes and 4 control tokens; try 1000"
            )
        if self.tokenizer in ("train", "bytes") and (given := self.bos_token or self.eos_token):
            raise InputError(
                f"the token {given!r} was named as BOS or EOS, but tokenizer {self.tokenizer!r} brings its own; "
                "leave bos_token and eos_token empty"
            )


@dataclass(frozen=True)
class GeneratedConfig:
    """Configuration of generated sequences, which take the place of text if tasks are named. Their tokens are those of
    the tokenizer "bytes", and only the tokens of answers count in the loss."""

    tasks: tuple[Literal["mqar", "copy"], ...] = ()
    """The tasks (docs/evaluation.md), mixed evenly; none reads text."""
    lengths: tuple[Annotated[int, Range(least=6, most=1 << 24)], ...] = (17, 33, 65, 129)
    """Lengths in tokens, mixed evenly; a sequence has as many pairs or tokens as fit."""


@dataclass(frozen=True)
class DataConfig:
    """Configuration of the prepared folders that are read and of their layout in batches."""

    path: FilePath = ""
    """A folder that `python -m tttlm.cli.prepare` wrote."""
    mixture: dict[FilePath, PositiveFloat] = field(default_factory=dict)
    """Several such folders and their weights, instead of `path`; examples are drawn in proportion to the weights."""
    validation_path: FilePath = ""
    """Another folder whose held-out documents are the validation split."""
    layout: Literal["windows", "packed", "documents"] = "windows"
    """windows: documents joined and cut; packed: complete documents packed into examples; documents: one after another
    at each index of the batch, with the state carried from step to step."""
    tokenizer: str = ""
    """The tokenizer that the tokens must have been made with; "" accepts any."""
    prepare: PrepareConfig = PrepareConfig()
    """The source that `path` is prepared from if it does not exist yet."""
    generated: GeneratedConfig = GeneratedConfig()
    """Generated sequences in place of prepared folders."""

    def validate(self) -> None:
        """Refuses contradictory fields.

        Raises:
            InputError: names the field and its value.
        """
        check_fields(self)
        if self.generated.tasks:
            if self.path or self.mixture or self.validation_path or self.prepare.given or self.layout != "windows":
                raise InputError(
                    "generated sequences take the place of text: name either data.generated.tasks, or path or mixture "
                    "with their layout"
                )
            refuse_unused(self, "for generated sequences", "tokenizer")
            if not self.generated.lengths:
                raise InputError("data.generated.lengths must name at least one length, got none")
            return
        refuse_unused(self, "without data.generated.tasks", "generated.lengths")
        if bool(self.path) == bool(self.mixture):
            raise InputError(
                "name the data by either data.path, the folder of its tokens (made of data.prepare.source if it is not "
                "there), or data.mixture, several such folders; not by both or none"
            )
        if len(self.mixture) > 1000:
            raise InputError(f"a mixture of {len(self.mixture)} folders; at most 1000 are possible")
        if self.mixture and self.prepare.given:
            raise InputError("prepare goes with path; prepare the folders of a mixture one by one beforehand")
