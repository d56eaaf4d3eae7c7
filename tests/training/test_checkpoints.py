"""A checkpoint gives back every bit or is found out; which ones are kept follows the policy."""

import errno
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttlm.errors import CannotWrite, InputError
from tttlm.training import checkpoint_files
from tttlm.training.checkpoint_files import check_path, load_params, saved_steps
from tttlm.training.checkpoints import Checkpoints
from tttlm.training.config import CheckpointConfig
from tttlm.training.digests import digests


def state(seed: int):
    rng = np.random.default_rng(seed)
    params = {
        "a": {0: {"kernel": jnp.asarray(rng.normal(size=(3, 40)), jnp.float32)}},
        "b": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
    }
    return params, {"count": jnp.int32(seed), "mean": jax.tree.map(lambda x: x * 2, params), "halted": jnp.bool_(0)}


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(folder: Path, *steps: int, **policy: int) -> Checkpoints:
    checkpoints = Checkpoints(folder, CheckpointConfig(**policy))
    for step in steps:
        checkpoints.save(step, *state(step), {"seconds": step / 3})
    checkpoints.wait()
    return checkpoints


def newest(checkpoints: Checkpoints):
    return checkpoints.newest(*map(shapes, state(0)))


def test_every_bit_comes_back(tmp_path):
    step, *found, totals = newest(save(tmp_path, 3))
    assert (step, totals) == (3, {"seconds": 1.0})
    jax.tree.map(np.testing.assert_array_equal, found, list(state(3)))


def test_the_last_ones_and_multiples_are_kept(tmp_path):
    save(tmp_path, *range(1, 9), keep_last=2, keep_every=3)
    assert saved_steps(tmp_path) == [3, 6, 7, 8]


def test_parameters_load_alone_in_another_dtype(tmp_path):
    save(tmp_path, 1, 2)
    params, _ = state(2)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    step, found = load_params(tmp_path, wanted)
    assert step == 2
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), found, params)
    assert load_params(tmp_path, wanted, 1)[0] == 1
    with pytest.raises(InputError, match=r"does not have a checkpoint of step 5; it has \[1, 2\]"):
        load_params(tmp_path, wanted, 5)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 100)


def test_a_file_cut_short_or_with_a_changed_byte_is_found_out(tmp_path, capsys):
    """Every file of a checkpoint that holds anything, truncated or with one bit flipped."""
    save(tmp_path / "sound", 1, 2).close()
    names = [path.relative_to(tmp_path / "sound" / "2") for path in files(tmp_path / "sound" / "2")]
    held = [name for name in names if name.parts[0] in ("params", "rest") and "d" in name.parts]
    assert held
    for number, name in enumerate([*held, Path("_CHECKPOINT_METADATA")]):
        for harm in ("cut", "flipped"):
            if (harm, name.name) == ("flipped", "_CHECKPOINT_METADATA"):
                continue
            folder = tmp_path / f"{harm}{number}"
            checkpoints = save(folder, 1, 2)
            at = files(folder / "2" / name.parent)[0] if name.parent != Path() else folder / "2" / name
            if harm == "cut":
                os.truncate(at, at.stat().st_size // 2)
            else:
                content = bytearray(at.read_bytes())
                content[len(content) // 2] ^= 16
                at.write_bytes(content)
            found = newest(checkpoints)
            said = capsys.readouterr().err
            if found[0] == 2:  # a file that only repeats what another holds
                jax.tree.map(np.testing.assert_array_equal, list(found[1:3]), list(state(2)))
            else:
                assert found[0] == 1
                assert "2 is damaged" in said
                assert (folder / "2.damaged").is_dir()
                assert saved_steps(folder) == [1]
            checkpoints.close()


def test_where_only_damaged_ones_are_left_every_start_refuses_and_nothing_changes(tmp_path):
    checkpoints = save(tmp_path, 1, 2)
    for step in (1, 2):
        os.truncate(tmp_path / str(step) / "_CHECKPOINT_METADATA", 10)
    for _ in range(3):
        with pytest.raises(InputError, match=r"no checkpoint is valid \(step 2: .*; step 1: "):
            newest(checkpoints)
        assert sorted(os.listdir(tmp_path)) == ["1", "2"]
    for step in (1, 2):
        (tmp_path / str(step)).rename(tmp_path / f"{step}.damaged")
    with pytest.raises(InputError, match=r"1.damaged was set aside"):
        newest(checkpoints)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_parameters_with_a_flipped_bit_are_not_read(tmp_path):
    """Whoever reads a checkpoint checks it, not only a run that goes on."""
    wanted = shapes(state(0)[0])
    refused = 0
    save(tmp_path / "sound", 1).close()
    names = [path.relative_to(tmp_path / "sound") for path in files(tmp_path / "sound" / "1" / "params")]
    for number in range(len(names)):
        folder = tmp_path / str(number)
        save(folder, 1).close()
        flip(files(folder / "1" / "params")[number])
        try:
            _, found = load_params(folder, wanted)
        except InputError as error:
            refused += "is damaged" in str(error)
        else:  # a file that only repeats what another holds
            jax.tree.map(np.testing.assert_array_equal, found, state(1)[0])
    assert refused > 0


def test_changed_totals_are_found_out(tmp_path, capsys):
    checkpoints = save(tmp_path, 1, 2)
    file = tmp_path / "2" / "_CHECKPOINT_METADATA"
    text = file.read_text()
    assert str(2 / 3) in text
    file.write_text(text.replace(str(2 / 3), "0.25"))
    assert newest(checkpoints)[0] == 1
    assert "2 is damaged (its metadata is not what was saved)" in capsys.readouterr().err
    with pytest.raises(InputError, match="does not have"):
        load_params(tmp_path, shapes(state(0)[0]), 2)


def test_a_checkpoint_under_the_name_of_another_or_of_another_run_is_found_out(tmp_path, capsys):
    checkpoints = save(tmp_path / "a", 1, 2)
    shutil.copytree(tmp_path / "a" / "1", tmp_path / "a" / "3")
    with pytest.raises(InputError, match=r"3 is damaged \(it was saved as that of step 1\)"):
        load_params(tmp_path / "a", shapes(state(0)[0]))
    assert newest(checkpoints)[0] == 2
    assert "3 is damaged" in capsys.readouterr().err

    (tmp_path / "a" / "2").rename(tmp_path / "a" / "2.kept")
    other = Checkpoints(tmp_path / "b", CheckpointConfig(), "another")
    other.save(2, *state(2), {})
    other.close()
    (tmp_path / "b" / "2").rename(tmp_path / "a" / "2")
    with pytest.raises(InputError, match=r"2 is damaged \(it was saved by a run of another configuration\)"):
        load_params(tmp_path / "a", shapes(state(0)[0]), run="this")
    assert load_params(tmp_path / "a", shapes(state(0)[0]), run="another")[0] == 2
    assert newest(Checkpoints(tmp_path / "a", CheckpointConfig(), "this"))[0] == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_an_error_of_the_file_system_leaves_sound_checkpoints_alone(tmp_path, monkeypatch, number):
    checkpoints = save(tmp_path, 1, 2)

    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    for name in ("load_checkpointables", "checkpointables_metadata"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_files.ocp, name, fail)
            with pytest.raises(InputError, match=rf"2 cannot be read \({os.strerror(number)}\): nothing was changed"):
                newest(checkpoints)
            with pytest.raises(InputError, match="cannot be read"):
                load_params(tmp_path, shapes(state(0)[0]))
    assert saved_steps(tmp_path) == [1, 2]
    assert newest(checkpoints)[0] == 2


def test_other_files_among_the_checkpoints_are_left_alone(tmp_path):
    save(tmp_path, 1, 2).close()
    for name in ("98", "007", "-3", "latest"):
        (tmp_path / name).mkdir()
    for name in ("99", ".DS_Store", "notes.txt"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "98" / "notes.txt").write_text("mine")
    assert saved_steps(tmp_path) == [1, 2]
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=2))
    assert newest(checkpoints)[0] == 2
    for step in (3, 4):
        checkpoints.save(step, *state(step), {})
    checkpoints.close()
    assert saved_steps(tmp_path) == [3, 4]
    left = {"98", "007", "-3", "latest", "99", ".DS_Store", "notes.txt"}
    assert left <= set(os.listdir(tmp_path))
    assert (tmp_path / "98" / "notes.txt").read_text() == "mine"


def test_reading_beside_a_training_that_deletes_old_checkpoints_reads_a_newer_one(tmp_path, monkeypatch):
    save(tmp_path, 1, 2, 3, keep_last=3).close()
    read, gone = checkpoint_files.read_arrays, []

    def deleted_meanwhile(path, facts, like):
        if len(gone) < 2:
            gone.append(path)
            shutil.rmtree(path)
            save(tmp_path, 3 + len(gone), keep_last=3).close()
        return read(path, facts, like)

    monkeypatch.setattr(checkpoint_files, "read_arrays", deleted_meanwhile)
    step, params = load_params(tmp_path, shapes(state(0)[0]))
    assert step == 5
    jax.tree.map(np.testing.assert_array_equal, params, state(5)[0])


def test_a_clock_that_jumps_changes_neither_which_are_kept_nor_which_is_newest(tmp_path, monkeypatch):
    checkpoints, now = Checkpoints(tmp_path, CheckpointConfig(keep_last=2)), time.time()
    for step, hours in enumerate((0, -5, 100, -30, 2), start=1):
        monkeypatch.setattr(time, "time", lambda hours=hours: now + 3600 * hours)
        monkeypatch.setattr(time, "time_ns", lambda hours=hours: int((now + 3600 * hours) * 1e9))
        checkpoints.save(step, *state(step), {})
        checkpoints.wait()
    assert saved_steps(tmp_path) == [4, 5]
    assert newest(checkpoints)[0] == 5
    assert newest(Checkpoints(tmp_path, CheckpointConfig()))[0] == 5


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("orbax.checkpoint.v1.training.Checkpointer", fail)
    with pytest.raises(InputError, match=r"cannot be used \(Input/output error\): nothing was changed"):
        Checkpoints(tmp_path, CheckpointConfig())
    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(InputError, match=r"cannot be read \(Input/output error\)"):
        saved_steps(tmp_path)


def test_a_checkpoint_of_another_version_is_refused_and_left(tmp_path, monkeypatch):
    checkpoints = save(tmp_path, 1)
    monkeypatch.setattr(checkpoint_files, "FORMAT", 99)
    with pytest.raises(InputError, match="was saved by another version of tttlm"):
        newest(checkpoints)
    assert os.listdir(tmp_path) == ["1"]


@pytest.mark.parametrize("name", ["a[1]", "a*b", "a?b", "a\\b", "gs:"])
def test_a_folder_that_checkpoints_cannot_be_read_back_from_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="choose another --run"):
        check_path(tmp_path / name)
    assert os.listdir(tmp_path / name) == []


@pytest.mark.parametrize("name", ["plain", "ä b", "a{b}", "a%20b", "a$b,c#d"])
def test_a_folder_that_they_can_be_read_back_from_is_not(tmp_path, name):
    (tmp_path / name).mkdir()
    check_path(tmp_path / name)
    assert os.listdir(tmp_path / name) == []


def test_what_does_not_read_back_is_not_called_saved(tmp_path, monkeypatch):
    checkpoints = save(tmp_path, 1)
    checkpoints.save(2, *state(2), {})
    flipped = []

    def spoiled(path, facts):
        if path.name == "2" and not flipped:
            flipped.append(path)
            os.truncate(path / "_CHECKPOINT_METADATA", 10)
        return read(path)

    read = checkpoint_files.read_facts
    monkeypatch.setattr("tttlm.training.checkpoints.read_facts", lambda path: spoiled(path, None))
    with pytest.raises(CannotWrite, match=r"\(it does not read back: .*that of step 1 is intact"):
        checkpoints.wait()
    assert saved_steps(tmp_path) == [1]
    assert (tmp_path / "2.unread").is_dir()


def test_any_single_change_of_a_value_changes_its_digest():
    rng = np.random.default_rng(0)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_):
        x = np.asarray(jnp.asarray(rng.integers(0, 2, (4, 6)), dtype))
        before = digests({"x": x})
        for place in np.ndindex(x.shape):
            changed = x.copy()
            changed[place] = not changed[place] if dtype == jnp.bool_ else changed[place] + 1
            assert digests({"x": changed}) != before
    swapped = x.copy().ravel()
    one, zero = np.argmax(swapped), np.argmin(swapped)
    swapped[[one, zero]] = swapped[[zero, one]]
    assert digests({"x": swapped.reshape(x.shape)}) != before
