"""What a run tells of its layers: numbers of every TTT layer, of the batch at hand, without touching the run."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests.training.small import small_config
from tests.training.test_loop import numbers, params
from tttlm.model import LanguageModel
from tttlm.training import loop, telemetry
from tttlm.training.clock import Clock, Totals

HYBRID = {
    "model.mixers": ("ttt_linear", "attention"),
    "model.num_layers": 4,
    "model.ttt.mini_batch_size": 8,
    "steps": 6,
    "evaluate.every": 0,
}


@pytest.mark.long
def test_every_ttt_layer_is_measured_every_so_many_steps_and_the_run_is_the_same(data, tmp_path):
    measured = small_config(tmp_path / "measured", data, **HYBRID, **{"telemetry.every": 3})
    plain = small_config(tmp_path / "plain", data, **HYBRID)
    for config in (measured, plain):
        assert loop.train(config).reason == "finished"
    lines = {line["step"]: line for line in numbers(measured)}
    names = {name for name in lines[3] if name.startswith("layer_")}
    assert {name.partition("/")[0] for name in names} == {"layer_00", "layer_02"}  # attention is in between
    assert {name.partition("/")[2] for name in names} == {
        *("inner_loss_before", "inner_loss_after", "inner_learning_rate", "inner_weight_norm"),
        *(f"drift_{share}" for share in (25, 50, 75, 100)),
    }
    for step, line in lines.items():
        assert bool(names & line.keys()) == (step % 3 == 0)
    assert [{k: v for k, v in line.items() if k not in names} for line in numbers(measured)] == numbers(plain)
    jax.tree.map(np.testing.assert_array_equal, params(measured), params(plain))
    first = lines[3]
    assert first["layer_00/inner_loss_after"] < first["layer_00/inner_loss_before"]
    assert 0 < first["layer_00/drift_25"] < first["layer_00/drift_100"]
    # half of the sigmoid at its start, over the head width, in the last place of a mini-batch
    assert first["layer_00/inner_learning_rate"] == pytest.approx(0.5 / 8 / 8, rel=0.1)


@pytest.mark.long
def test_a_layer_within_the_model_is_measured_on_what_it_reads(x64):
    config = small_config(**HYBRID, **{"model.dtype": "float64", "model.param_dtype": "float64"}).model
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, 300)
    first, attention = jax.jit(lambda: model.inner_statistics(tokens))()
    assert attention is None
    pattern = jax.tree.map(lambda x: x[0], nnx.state(model.stack))
    block = nnx.merge(nnx.graphdef(model.stack), pattern).blocks[0]

    @jax.jit
    def of_block():
        read = model.embed(tokens)
        read = read + block.conv(block.conv_norm(read))[0]
        return block.mixer.inner_statistics(block.mixer_norm(read))

    alone = of_block()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-9), first, alone)


def test_the_share_of_the_peak_and_the_memory_are_told_where_they_are_known(monkeypatch):
    for peak in (1e12, None):
        clock = Clock(Totals(), tokens=10, flops=5e9, peak=peak)
        clock.tick(10)
        second = clock.tick(10)
        if peak:
            assert second["mfu"] == pytest.approx(second["tokens_per_second"] / 10 * 5e9 / 1e12)
        else:
            assert "mfu" not in second
    assert telemetry.device_memory() == {}  # a CPU does not tell

    class Told:
        def memory_stats(self):
            return {"peak_bytes_in_use": 3 * 2**30}

    monkeypatch.setattr(telemetry.jax, "local_devices", lambda: [Told()])
    assert telemetry.device_memory() == {"device_memory": 3.0}
