"""Images are read from exactly the formats in which they are published, and nothing is unpickled."""

import pickle

import numpy as np
import pytest

from tttlm.adaptation.images import CIFAR_RECORD, cifar10, cifar10_c, corrupted, digits, from_datasets
from tttlm.errors import InputError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (10, 32, 32, 3)).astype(np.uint8)
LABELS = np.arange(10)


@pytest.fixture
def cifar(tmp_path):
    """CIFAR-10's binary files, two images each, written byte by byte as their page says."""
    for n in range(5):
        with open(tmp_path / f"data_batch_{n + 1}.bin", "wb") as file:
            for i in (2 * n, 2 * n + 1):
                file.write(bytes([LABELS[i]]))
                for channel in range(3):
                    for row in range(32):
                        file.write(bytes(PIXELS[i, row, :, channel].tolist()))
    (tmp_path / "test_batch.bin").write_bytes((tmp_path / "data_batch_2.bin").read_bytes())
    return tmp_path


def test_cifar10_binary_files_give_the_images_and_labels_written(cifar):
    train, test = cifar10(cifar, test=False), cifar10(cifar, test=True)
    np.testing.assert_array_equal(np.round(train.images * 255).astype(np.uint8), PIXELS)
    np.testing.assert_array_equal(train.labels, LABELS)
    np.testing.assert_array_equal(test.images, train.images[2:4])
    assert (train.images.dtype, train.labels.dtype, len(test)) == (np.float32, np.int32, 2)


def test_broken_cifar10_files_are_refused_in_a_line(cifar):
    path = cifar / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"not a multiple of the record size {CIFAR_RECORD}"):
        cifar10(cifar, test=True)
    path.write_bytes(bytes([10]) * CIFAR_RECORD)
    with pytest.raises(InputError, match="label 10"):
        cifar10(cifar, test=True)
    path.unlink()
    with pytest.raises(InputError, match="binary version"):
        cifar10(cifar, test=True)


@pytest.mark.parametrize("name", ["test_batch", "test_batch.bin"])
def test_the_pickled_archive_is_refused_and_not_read(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (tmp_path / name).write_bytes(pickle.dumps({"data": Bomb()}))
    with pytest.raises(InputError, match=r"pickle.*binary version"):
        cifar10(tmp_path, test=True)
    assert not (tmp_path / "exploded").exists()


def test_cifar10_c_is_cut_by_severity(tmp_path):
    images = RNG.integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    labels = np.tile(np.arange(4), 5)
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    for severity in range(1, 6):
        found, its = cifar10_c(tmp_path, "fog", severity)
        np.testing.assert_array_equal(np.round(found * 255), images[4 * severity - 4 : 4 * severity])
        np.testing.assert_array_equal(its, np.arange(4))
    with pytest.raises(InputError, match="1 to 5"):
        cifar10_c(tmp_path, "fog", 0)
    with pytest.raises(InputError, match="cannot be read"):
        cifar10_c(tmp_path, "snow", 1)
    np.save(tmp_path / "frost.npy", images.astype(np.float32))
    with pytest.raises(InputError, match="not uint8"):
        cifar10_c(tmp_path, "frost", 1)
    np.save(tmp_path / "labels.npy", labels[:-1])
    with pytest.raises(InputError, match="not 20 integers"):
        cifar10_c(tmp_path, "fog", 1)
    np.save(tmp_path / "snow.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="pickled ones are not read"):
        cifar10_c(tmp_path, "snow", 1)


def test_images_of_the_package_datasets_are_read_from_disk_and_from_parquet(tmp_path):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    from PIL import Image

    table = datasets.Dataset.from_dict(
        {"img": [Image.fromarray(p) for p in PIXELS], "label": LABELS}, features=features
    )
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files").mkdir()
    table.to_parquet(str(tmp_path / "files" / "test-00000.parquet"))
    for folder in ("saved", "files"):
        found = from_datasets(str(tmp_path / folder), split="test")
        np.testing.assert_array_equal(np.round(found.images * 255).astype(np.uint8), PIXELS)
        np.testing.assert_array_equal(found.labels, LABELS)
    with pytest.raises(InputError, match="split 'train'"):
        from_datasets(str(tmp_path / "saved"), split="train")
    table.rename_column("label", "kind").cast_column("kind", datasets.Value("int64")).save_to_disk(
        str(tmp_path / "odd")
    )
    with pytest.raises(InputError, match="columns img, kind"):
        from_datasets(str(tmp_path / "odd"), split="test")


def test_digits_are_five_thousand_and_balanced():
    found = digits()
    assert found.images.shape == (5000, 28, 28, 1)
    assert (found.images.min(), found.images.max()) == (0, 1)
    np.testing.assert_array_equal(np.bincount(found.labels), 500)


def test_corruptions_are_seeded_grow_with_severity_and_leave_numpy_alone():
    images = digits().images[::1000]
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    for name in ("gaussian_noise", "defocus_blur", "contrast"):
        one, again, other = (corrupted(images, name, 3, seed=seed) for seed in (0, 0, 1))
        np.testing.assert_array_equal(one, again)
        assert np.array_equal(one, other) == (name != "gaussian_noise")
        distance = [np.mean((corrupted(images, name, severity, seed=0) - images) ** 2) for severity in (1, 3, 5)]
        assert distance == sorted(distance)
        assert one.shape == images.shape
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    with pytest.raises(InputError, match="unknown corruption 'rain'"):
        corrupted(images, "rain", 1, seed=0)
