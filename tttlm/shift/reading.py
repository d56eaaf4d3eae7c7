"""Reads samples from folders: arrays and images from `.npy` and PNG files, stretches of tokens from text."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from tttlm.data.config import PrepareConfig
from tttlm.data.sources import RawDocument, open_source
from tttlm.errors import InputError
from tttlm.progress import say

Kind = Literal["text", "images", "arrays"]
_DOCUMENT_BYTES = 16 << 20
_MOST_PIXELS = 1 << 26  # of one image, which takes a gigabyte in memory; a file of a few kilobytes can have more


@dataclass(frozen=True)
class Stretches:
    """Stretches (segments of equal length) of the documents of a folder.

    Attributes:
        tokens: tokens of each stretch, uint32 `[T]`; the last one of a document may be shorter.
        documents: index of the document of each stretch.
        invalid: number of documents with invalid UTF-8, whose invalid bytes were read as U+FFFD.
    """

    tokens: list[np.ndarray]
    documents: np.ndarray
    invalid: int = 0


def kind_of(path: Path) -> Kind:
    """The kind of samples in a file or folder, by the names of its files and, for `.npy`, the number of axes.

    Raises:
        InputError: there are no files, or files of several kinds.
    """
    files = _files(path)
    suffixes = {file.suffix.lower() for file in files}
    if ".png" in suffixes and ".npy" not in suffixes:
        return "images"
    if suffixes == {".npy"}:
        return "images" if _open_array(files[0]).ndim > 2 else "arrays"
    if suffixes & {".npy", ".png"}:
        raise InputError(
            f"{path} has files of several kinds ({', '.join(sorted(suffixes))}); keep one kind in a folder"
        )
    return "text"


def read_arrays(path: Path, samples: int, seed: int) -> np.ndarray:
    """Features `[N, D]` from `.npy` files: `[D]` is one sample, `[N, D]` many; at most `samples`, chosen at random.

    Raises:
        InputError: a file is not an array of numbers, or arrays have other shapes or different numbers of features.
    """
    rows = []
    for file in _of_suffix(path, ".npy", "arrays"):
        array = _open_array(file)
        if array.ndim not in (1, 2):
            raise InputError(f"{file} has shape {array.shape}; features are [N, D], or [D] for one sample")
        rows.append((file, array[None] if array.ndim == 1 else array))
    return _chosen(rows, samples, seed, "features")


def read_images(path: Path, samples: int, seed: int) -> np.ndarray:
    """Images `[N, H, W, C]` in float32 from PNG or `.npy` files; at most `samples`, chosen at random.

    A `.npy` file is one image `[H, W]` or `[H, W, C]` with one, three or four channels, or many, `[N, H, W]` or
    `[N, H, W, C]`. 8-bit integers are scaled to [0, 1]; a fourth channel (alpha) is dropped. Greyscale images have one
    channel, however they are stored.

    Raises:
        InputError: a file is not an image, or images have different sizes.
    """
    files = _files(path)
    if any(file.suffix.lower() == ".npy" for file in files):
        rows = [(file, _as_images(_open_array(file), file)) for file in _of_suffix(path, ".npy", "images")]
    else:
        files = _of_suffix(path, ".png", "images")
        if len(files) > samples:
            files = [files[i] for i in _drawn(len(files), samples, seed)]
        rows = [(file, _as_images(_read_png(file), file)) for file in files]
    if {array.shape[-1] for _, array in rows} == {1, 3}:  # greyscale among colour images
        rows = [(file, np.broadcast_to(array, (*array.shape[:-1], 3))) for file, array in rows]
    images = _chosen(rows, samples, seed, "pixels")
    # Many programs write greyscale images with three equal channels.
    return images[..., :1] if (images == images[..., :1]).all() else images


def shrink_images(images: np.ndarray, size: int) -> np.ndarray:
    """Images with sides of at most `size`, by the mean over squares of pixels; smaller ones are unchanged."""
    n, height, width, channels = images.shape
    factor = -(-max(height, width) // size)
    if factor == 1:
        return images
    rows, columns = max(height // factor, 1), max(width // factor, 1)
    images = images[:, : rows * min(factor, height), : columns * min(factor, width)]
    return images.reshape(n, rows, -1, columns, images.shape[2] // columns, channels).mean((2, 4))


def read_stretches(
    path: Path, encode: Callable[[str], np.ndarray], *, length: int, per_document: int, samples: int, seed: int
) -> Stretches:
    """Stretches of `length` tokens, evenly spaced over each document; at most `samples`, chosen at random.

    Documents are read one at a time, so that memory does not grow with the folder.

    Raises:
        InputError: there is no text.
    """
    rng = np.random.default_rng(seed)
    kept: list[tuple[int, int, np.ndarray]] = []
    seen = number = invalid = 0
    for document in _documents(path):
        data = b"".join(_some(document))
        text = data.decode("utf-8", "replace")
        invalid += len(data) < _DOCUMENT_BYTES and text.encode() != data  # else it may end within a character
        tokens = encode(text)
        whole = max(len(tokens) // length, 1)
        starts = np.unique(np.linspace(0, whole - 1, min(whole, per_document)).round().astype(int)) * length
        for start in starts if len(tokens) else ():
            stretch = (number, int(start), tokens[start : start + length])
            # Reservoir sampling: every stretch is kept with equal probability.
            if len(kept) < samples:
                kept.append(stretch)
            elif (replaced := rng.integers(seen + 1)) < samples:
                kept[replaced] = stretch
            seen += 1
        number += bool(len(tokens))
    if not kept:
        raise InputError(f"{path} has no text in it")
    kept.sort(key=lambda stretch: stretch[:2])
    return Stretches([tokens for _, _, tokens in kept], np.array([document for document, _, _ in kept]), invalid)


class Words:
    """A tokenizer of words and punctuation in lower case; ids are assigned in the order of occurrence."""

    _pattern = re.compile(r"\w+|[^\w\s]")

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, text: str) -> np.ndarray:
        words = (match[0].lower() for match in self._pattern.finditer(text))
        return np.array([self.ids.setdefault(word, len(self.ids)) for word in words], np.uint32)

    def names(self) -> list[str]:
        return list(self.ids)


def _documents(path: Path) -> Iterator[RawDocument]:
    source = open_source(PrepareConfig(source=(str(path),), held_out=0))
    yield from source.documents()
    for line in source.skipped.lines():
        say(line)
    if source.empty:
        say(f"skipped: {source.empty:,} documents of {path} without text")


def _some(document: RawDocument) -> Iterator[bytes]:
    """A document, or the first 16 MB of it."""
    left = _DOCUMENT_BYTES
    for chunk in document.chunks:
        yield chunk[:left]
        left -= len(chunk)
        if left <= 0:
            return


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} does not exist; name a folder of text, .npy or PNG files, or one such file")
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise InputError(f"{path} has no samples in it: there are no files")
    return files


def _of_suffix(path: Path, suffix: str, kind: str) -> list[Path]:
    files = [file for file in _files(path) if file.suffix.lower() == suffix]
    if not files:
        raise InputError(f"{path} has no {kind} in it: there are no {suffix} files")
    return files


def left_out(path: Path, kind: Kind) -> list[str]:
    """Names of the files of a folder that are no images or arrays, and are not read."""
    if kind == "text" or path.is_file():
        return []  # files of text are found by `tttlm.data`
    files = _files(path)
    arrays = kind == "arrays" or any(file.suffix.lower() == ".npy" for file in files)
    return [str(file.relative_to(path)) for file in files if file.suffix.lower() != (".npy" if arrays else ".png")]


def _open_array(file: Path) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        why = (
            "it has Python objects, which are never unpickled"
            if "Python objects" in str(error)
            else "it is not a .npy array"
        )
        raise InputError(f"{file} cannot be read: {why}; write an array of numbers with numpy.save") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise InputError(f"{file} has {getattr(array, 'dtype', 'several arrays')}; samples are arrays of numbers")
    return array


def _read_png(file: Path) -> np.ndarray:
    from matplotlib.image import imread

    with open(file, "rb") as stream:
        head = stream.read(24)  # the signature, and the chunk that begins with width and height
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    if width * height > _MOST_PIXELS:
        raise InputError(f"{file} has {width} x {height} pixels, at most {_MOST_PIXELS:,} are read; make it smaller")
    try:
        return imread(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{file} cannot be read as a PNG image: {str(error).splitlines()[0]}") from None


def _as_images(array: np.ndarray, file: Path) -> np.ndarray:
    """The images of one file as `[N, H, W, C]`, in the dtype of the file."""
    if array.ndim == 2:
        array = array[None, :, :, None]
    elif array.ndim == 3:
        array = array[None] if array.shape[-1] in (1, 3, 4) else array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise InputError(f"{file} has shape {array.shape}; images are [H, W], [H, W, C], [N, H, W] or [N, H, W, C]")
    return array[..., :3]


def _chosen(rows: list[tuple[Path, np.ndarray]], samples: int, seed: int, what: str) -> np.ndarray:
    """At most `samples` rows of all files together, chosen at random, in float32."""
    first, shape = rows[0][0], rows[0][1].shape[1:]
    for file, array in rows:
        if array.shape[1:] != shape:
            raise InputError(
                f"{first} has {what} {'x'.join(map(str, shape))} and {file} "
                f"{'x'.join(map(str, array.shape[1:]))}; all samples need the same"
            )
    starts = np.cumsum([0, *(len(array) for _, array in rows)])
    index = _drawn(int(starts[-1]), samples, seed)
    parts = []
    for (_, array), start, stop in zip(rows, starts, starts[1:], strict=False):
        part = np.asarray(array[index[(index >= start) & (index < stop)] - start])
        parts.append(part.astype(np.float32) / np.float32(255 if part.dtype == np.uint8 else 1))
    return np.concatenate(parts)


def _drawn(count: int, samples: int, seed: int) -> np.ndarray:
    """`samples` random indices below `count`, ascending; all of them if there are no more."""
    if count <= samples:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, samples, replace=False))
