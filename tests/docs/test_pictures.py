"""The pictures of the page on TTT layers are drawn by the script that it names, and show what the page says."""

import importlib.util

import numpy as np

from tests.docs.pages import DOCS, PAGES


def test_the_inner_model_learns_within_a_task_and_a_larger_mini_batch_learns_less(tmp_path):
    script = DOCS / "scripts" / "ttt_layer_pictures.py"
    spec = importlib.util.spec_from_file_location("ttt_layer_pictures", script)
    assert spec is not None
    assert spec.loader is not None
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)

    online, batched = (pictures.inner_losses(size).reshape(pictures.TASKS, pictures.TASK) for size in (1, 16))
    for losses in (online, batched):
        assert np.all(losses[:, -8:].mean(1) < 0.2 * losses[:, :8].mean(1))
        assert np.all(losses[1:, 0] > 5 * losses[:-1, -8:].mean(1))
    assert np.all(online[:, -8:].mean(1) < 0.5 * batched[:, -8:].mean(1))

    pictures.diagram().savefig(tmp_path / "diagram.png")
    assert (tmp_path / "diagram.png").stat().st_size > 5000
    for name in ("ttt-layer.png", "ttt-layer-learning.png"):
        assert (DOCS / name).is_file()
        assert f"]({name})" in PAGES["docs/ttt-layer.md"]
