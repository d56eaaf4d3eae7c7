"""The experiment runs from its formats of data to its report, goes on where it was stopped, and says what is wrong."""

import json

import numpy as np
import pytest

from tttlm.adaptation.results import rank
from tttlm.adaptation.saved_state import read_arrays
from tttlm.cli.adapt import main
from tttlm.errors import InputError

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """CIFAR-10's binary files and CIFAR-10-C in small: the place of a bright square is the class, noise the shift."""
    folder = tmp_path_factory.mktemp("cifar")

    def images(count):
        labels = np.arange(count) % 4
        pixels = RNG.integers(0, 60, (count, 32, 32, 3)).astype(np.uint8)
        for pixel, label in zip(pixels, labels, strict=True):
            row, column = divmod(int(label), 2)
            pixel[16 * row + 3 : 16 * row + 9, 16 * column + 3 : 16 * column + 13] = 220
        return pixels, labels

    def write(name, pixels, labels):
        records = np.concatenate([labels[:, None], pixels.transpose(0, 3, 1, 2).reshape(len(labels), -1)], axis=1)
        (folder / name).write_bytes(records.astype(np.uint8).tobytes())

    for n in range(1, 6):
        write(f"data_batch_{n}.bin", *images(40))
    pixels, labels = images(20)
    write("test_batch.bin", pixels, labels)
    shifted = [np.clip(pixels + RNG.normal(0, 40 * s, pixels.shape), 0, 255).astype(np.uint8) for s in range(1, 6)]
    np.save(folder / "noise.npy", np.concatenate(shifted))
    np.save(folder / "labels.npy", np.tile(labels, 5))
    return folder


def flags(data, output, *more):
    return [
        *("cifar10", "--data", str(data), "--corrupted", str(data), "--output", str(output), "--network", "small"),
        *("--features", "8", "--corruptions", "noise", "--severities", "5", "--seeds", "0", "--test_images", "12"),
        *("--training.epochs", "12", "--training.batch_size", "30", "--training.no_flip", "--training.padding", "0"),
        *("--methods.copies", "1", "--methods.ttt_steps", "1", "--methods.tent_batch", "6", "--methods.uda_steps", "2"),
        *("--methods.uda_batch", "6", "--alignment_images", "4", *more),
    ]


@pytest.mark.slow
def test_a_command_trains_adapts_and_reports_and_does_nothing_twice(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["configs/adapt/cifar10.yaml", *flags(data, "out")[1:]]
    assert main(command) == 0
    report = (tmp_path / "out/report/report.md").read_text()
    found = json.loads((tmp_path / "out/report/report.json").read_text())
    assert found["conditions"] == ["clean", "noise-5"]
    assert set(found["errors"]) == {"none", "joint", "ttt", "ttt_online", "tent", "uda_ss"}
    assert found["errors"]["none"][0][0] < 40  # of four classes; it learned
    for name in ("errors.png", "shift.png", "alignment.png"):
        assert (tmp_path / "out/report" / name).read_bytes()[:4] == b"\x89PNG"
        assert name in report
    for method, errors in found["errors"].items():
        logits = read_arrays(tmp_path / "out/seed0/logits" / method / "noise-5.safetensors", advice="")["values"]
        assert errors[0][1] == pytest.approx(100 * np.mean(logits.argmax(-1) != np.arange(12) % 4))
    assert "noise-5" in report
    assert "MMD^2, median bandwidth" in found["shift_ranks"]

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    (tmp_path / "out/seed0/logits/ttt/noise-5.safetensors").unlink()
    assert main(command) == 0
    again = json.loads((tmp_path / "out/report/report.json").read_text())
    assert again == found
    assert {p: p.stat().st_mtime_ns for p in stamps if "ttt/noise-5" not in str(p)}.items() <= stamps.items()

    content = bytearray((tmp_path / "out/seed0/logits/ttt/noise-5.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "out/seed0/logits/ttt/noise-5.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"noise-5.safetensors: was altered.*delete it, and it is computed again"):
        main(command)
    with pytest.raises(InputError, match="other settings"):
        main([*command, "--methods.copies", "2"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "name a configuration"),
        (["configs/adapt/nowhere.yaml"], "nowhere.yaml"),
        (["configs/adapt/cifar10.yaml", "--data", "", "--output", "o"], "name the folder of the images"),
        (["configs/adapt/digits.yaml", "--severities", "6", "--output", "o"], "severities"),
        (["configs/adapt/digits.yaml", "--test_images", "4000", "--output", "o"], "at most a quarter"),
        (["configs/adapt/digits.yaml", "--sevrities", "1"], "sevrities"),
        (["configs/adapt/digits.yaml", "--corrupted", "x", "--output", "o"], "corrupted = 'x' is not used with source"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(more, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says) as error:
        main(more)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())  # a refused command claims no folder


def test_rank_correlation_leaves_out_what_could_not_be_measured():
    found = rank([1.0, 2, np.nan, 3, 10], [1.0, 4, 7, 9, 100])
    assert (found.correlation, found.count) == (pytest.approx(1), 4)
    assert np.isnan(rank([1, 1, 1, 1], [1, 2, 3, 4]).correlation)
