"""Folders as samples: what is read is what was written, whatever the layout; what cannot be read is one line."""

import numpy as np
import pytest
from matplotlib.image import imsave

from tttlm.errors import InputError
from tttlm.evaluation.texts import find_texts
from tttlm.shift.picture import project
from tttlm.shift.reading import Words, kind_of, left_out, read_arrays, read_images, read_stretches, shrink_images
from tttlm.shift.tokens import count_tokens, frequency_features, token_differences


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)


def test_images_are_the_same_from_every_format(tmp_path, images):
    expected = images.astype(np.float32) / 255
    for name in ("many", "single", "png", "opaque"):
        (tmp_path / name).mkdir()
    np.save(tmp_path / "many" / "all.npy", images)
    for i, image in enumerate(images):
        np.save(tmp_path / "single" / f"{i}.npy", image)
        imsave(tmp_path / "png" / f"{i}.png", image)
        imsave(tmp_path / "opaque" / f"{i}.png", np.concatenate([image, np.full((8, 6, 1), 255, np.uint8)], -1))
    np.save(tmp_path / "floats.npy", expected)
    for name in ("many", "single", "png", "opaque", "floats.npy"):
        assert kind_of(tmp_path / name) == "images"
        np.testing.assert_allclose(read_images(tmp_path / name, 100, 0), expected, atol=1e-6)


def test_grey_images_have_one_channel(tmp_path, images):
    grey = images[..., :1]
    np.save(tmp_path / "flat.npy", grey[..., 0])
    (tmp_path / "png").mkdir()
    for i, image in enumerate(grey):
        imsave(tmp_path / "png" / f"{i}.png", np.repeat(image, 3, -1))
    for name in ("flat.npy", "png"):
        np.testing.assert_allclose(read_images(tmp_path / name, 100, 0), grey / 255, atol=1e-6)


def test_samples_are_drawn_at_random_and_the_same_for_a_seed(tmp_path, images):
    np.save(tmp_path / "a.npy", images[:3])
    np.save(tmp_path / "b.npy", images[3:])
    drawn = read_images(tmp_path, 4, 1)
    assert drawn.shape == (4, 8, 6, 3)
    np.testing.assert_array_equal(drawn, read_images(tmp_path, 4, 1))
    seen = {tuple(read_images(tmp_path, 2, seed)[:, 0, 0, 0]) for seed in range(20)}
    assert len(seen) > 3


def test_large_images_are_averaged():
    images = np.arange(2 * 6 * 9 * 1, dtype=np.float32).reshape(2, 6, 9, 1)
    small = shrink_images(images, 3)
    assert small.shape == (2, 2, 3, 1)
    np.testing.assert_allclose(small[1, 1, 2, 0], images[1, 3:6, 6:9, 0].mean())
    assert shrink_images(images, 9) is images
    assert shrink_images(np.ones((1, 7, 70, 3)), 16).shape == (1, 1, 14, 3)


def test_arrays_are_rows_of_one_or_many_files(tmp_path):
    rows = np.random.default_rng(0).standard_normal((6, 4))
    np.save(tmp_path / "a.npy", rows[:4])
    np.save(tmp_path / "b.npy", rows[4])
    np.save(tmp_path / "c.npy", rows[5])
    assert kind_of(tmp_path) == "arrays"
    np.testing.assert_allclose(read_arrays(tmp_path, 10, 0), rows, rtol=1e-6)


def test_stretches_are_spread_over_documents(tmp_path):
    (tmp_path / "1.txt").write_text(" ".join(f"a{i}" for i in range(100)))
    (tmp_path / "2.txt").write_text("one two three")
    (tmp_path / "3.txt").write_text("")
    words = Words()
    found = read_stretches(tmp_path, words.encode, length=10, per_document=3, samples=50, seed=0)
    names = words.names()
    assert found.documents.tolist() == [0, 0, 0, 1]
    assert [len(t) for t in found.tokens] == [10, 10, 10, 3]
    first = [int(names[t[0]].removeprefix("a")) for t in found.tokens[:3]]
    assert first[0] == 0
    assert first[2] == 90
    assert all(start % 10 == 0 for start in first)
    some = read_stretches(tmp_path, words.encode, length=10, per_document=10, samples=4, seed=0)
    assert len(some.tokens) == 4


def test_every_stretch_is_as_likely(tmp_path):
    (tmp_path / "1.txt").write_text(" ".join(f"a{i}" for i in range(20)))
    kept = np.zeros(20)
    for seed in range(400):
        words = Words()
        for t in read_stretches(tmp_path, words.encode, length=1, per_document=20, samples=5, seed=seed).tokens:
            kept[t[0]] += 1
    np.testing.assert_allclose(kept / 400, 0.25, atol=0.09)


def test_words_are_counted_and_the_one_that_differs_is_found(tmp_path):
    for side, extra in (("a", "sea"), ("b", "desert")):
        (tmp_path / side).mkdir()
        for i in range(5):
            (tmp_path / side / f"{i}.txt").write_text(f"The {extra}, the sky and the road. " * 3)
    words = Words()
    a, b = (
        read_stretches(tmp_path / side, words.encode, length=20, per_document=9, samples=99, seed=0) for side in "ab"
    )
    counted = count_tokens(a, b)
    assert counted.by_document
    assert counted.a.shape == (5, len(words.ids) + 1)
    names = [words.names()[i] for i in counted.ids]
    assert names[0] == "the"
    assert counted.a[:, 0].tolist() == [sum((t == words.ids["the"]).sum() for t in a.tokens) / 5] * 5
    assert counted.a.sum() == sum(map(len, a.tokens))
    sizes, rises = token_differences(counted)
    top = np.argsort(-sizes)[:2]
    assert {names[i] for i in top} == {"sea", "desert"}
    assert rises[names.index("desert")] > 0 > rises[names.index("sea")]
    features = frequency_features(a, counted.ids)
    np.testing.assert_allclose((features**2).sum(1), 1, rtol=1e-5)
    assert not count_tokens(a, b, fewest=6).by_document


def test_a_projection_keeps_distances_in_a_plane():
    rng = np.random.default_rng(0)
    plane = np.linalg.qr(rng.standard_normal((6, 2)))[0]
    a, b = rng.standard_normal((20, 2)) @ plane.T + 3, (rng.standard_normal((30, 2)) + 2) @ plane.T + 3
    points_a, points_b, shares = project(a, b)
    between = lambda x, y: np.linalg.norm(x[:, None] - y[None], axis=-1)
    np.testing.assert_allclose(between(points_a, points_b), between(a, b), atol=1e-9)
    assert shares.sum() == pytest.approx(1)
    assert project(a[:, :1], b[:, :1])[0].shape == (20, 2)


def test_an_image_of_absurd_size_is_one_line(tmp_path):
    head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2
    (tmp_path / "a.png").write_bytes(head + bytes(100))
    with pytest.raises(InputError, match="has 60000 x 60000 pixels, at most 67,108,864"):
        read_images(tmp_path, 8, 0)


def test_what_is_not_read_as_it_is_is_counted(tmp_path, capsys):
    for name in ("a.png", "b.PNG", "c.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert left_out(tmp_path, "images") == ["c.jpg", "notes.txt"]
    (tmp_path / "d.npy").write_bytes(b"")
    assert left_out(tmp_path, "images") == left_out(tmp_path, "arrays") == ["a.png", "b.PNG", "c.jpg", "notes.txt"]
    assert left_out(tmp_path, "text") == []
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a").write_bytes(b"caf\xe9")
    (tmp_path / "text" / "b").write_bytes("café".encode())
    (tmp_path / "text" / ".c").write_bytes(b"hidden")
    (tmp_path / "text" / "d").write_bytes(b"")
    read = read_stretches(tmp_path / "text", Words().encode, length=8, per_document=1, samples=9, seed=0)
    assert (len(read.tokens), read.invalid) == (2, 1)
    said = capsys.readouterr().err
    assert "skipped: 1 hidden files or folders (.c)" in said
    assert "skipped: 1 documents" in said
    assert [text.name for text in find_texts([str(tmp_path / "text")])] == ["a", "b"]
    assert "skipped: 1 empty files (d)" in capsys.readouterr().err


def test_unusable_folders_are_one_line(tmp_path):
    def says(message, read, *rest):
        with pytest.raises(InputError, match=message) as caught:
            read(*rest)
        assert "\n" not in str(caught.value)

    says("does not exist", kind_of, tmp_path / "no")
    (tmp_path / "empty").mkdir()
    says("no samples in it: there are no files", kind_of, tmp_path / "empty")
    (tmp_path / "mixed").mkdir()
    np.save(tmp_path / "mixed" / "a.npy", np.ones(3))
    (tmp_path / "mixed" / "a.txt").write_text("a")
    says(r"several kinds \(.npy, .txt\)", kind_of, tmp_path / "mixed")
    np.save(tmp_path / "object.npy", np.array([{}, None]))
    says("never unpickled", kind_of, tmp_path / "object.npy")
    (tmp_path / "text.npy").write_text("hello")
    says("cannot be read", read_arrays, tmp_path / "text.npy", 9, 0)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    says("cannot be read as a PNG", read_images, tmp_path / "broken.png", 9, 0)
    np.save(tmp_path / "five.npy", np.ones((2, 2, 2, 2, 2)))
    says(r"images are \[H, W\]", read_images, tmp_path / "five.npy", 9, 0)
    (tmp_path / "sizes").mkdir()
    np.save(tmp_path / "sizes" / "a.npy", np.ones((3, 4)))
    np.save(tmp_path / "sizes" / "b.npy", np.ones((3, 5)))
    says("has features 4 and .* 5; all samples need the same", read_arrays, tmp_path / "sizes", 9, 0)
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text(" \n ")
    says("has no text in it", read_stretches_of_words, tmp_path / "blank")


def read_stretches_of_words(path):
    return read_stretches(path, Words().encode, length=8, per_document=2, samples=9, seed=0)
