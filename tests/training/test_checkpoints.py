"""A checkpoint gives back every bit or is found out; which ones are kept follows the policy."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tttlm.errors import InputError
from tttlm.training.checkpoints import Checkpoints, digests, load_params, saved_steps
from tttlm.training.config import CheckpointConfig


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
    with pytest.raises(InputError, match=r"does not hold a checkpoint of step 5; it holds \[1, 2\]"):
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


def test_without_one_sound_checkpoint_nothing_starts_over_silently(tmp_path):
    checkpoints = save(tmp_path, 1)
    os.truncate(tmp_path / "1" / "_CHECKPOINT_METADATA", 10)
    with pytest.raises(InputError, match="no checkpoint is sound"):
        newest(checkpoints)


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
