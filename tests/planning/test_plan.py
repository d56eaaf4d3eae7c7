"""A plan says what a run needs of devices that are not here, from the program that would run on them."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.small import small_config
from tttlm.errors import InputError
from tttlm.model import parameter_count
from tttlm.planning import plan as planning
from tttlm.planning import topologies
from tttlm.planning.collectives import Collective, collectives
from tttlm.planning.gpu_target import GPUS, target_config
from tttlm.planning.plan import Plan, describe, make_plan
from tttlm.training.devices import DEVICES, GIB

ROOT = Path(__file__).parents[2]
V5E = next(device for device in DEVICES if device.name == "v5e")
PLAN = Plan(
    topology="v5e:4x8",
    devices=32,
    mesh={"data": 1, "fsdp": 32, "tensor": 1, "context": 1},
    parameters=10**9,
    flops_per_token=6e9,
    tokens_per_step=2**19,
    memory=16 * GIB,
    peak=4 * GIB,
    state=GIB,
    collectives=[Collective("all-gather", 3, 2 * GIB)],
    loops_known=True,
    seconds=46.0,
)


@pytest.fixture(scope="module")
def compiled() -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tests.planning.plans"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return json.loads(done.stdout)


@pytest.mark.long
def test_collectives_are_counted_as_often_as_their_loops_turn(compiled):
    assert compiled["exchanges"] == {
        "known": True,
        "all-gather": [1, 64 * 4],
        "all-reduce": [15, 15 * 8 * 4],
        "reduce-scatter": [1, 64 * 4],
        "collective-permute": [5, 5 * 8 * 4],
    }


@pytest.mark.long
def test_replicas_communicate_gradients_and_shards_communicate_parameters(compiled):
    parameters = parameter_count(small_config().model)
    data, fsdp = ({one["kind"]: one["bytes"] for one in compiled[name]["collectives"]} for name in ("data", "fsdp"))
    assert data.keys() == {"all-reduce"}
    # Every gradient once; some that are added up from two places twice, as the compiler has it.
    assert 1 <= data["all-reduce"] / (4 * parameters) < 2
    assert fsdp["all-gather"] > 0


def test_shards_of_a_model_hold_an_eighth_of_it_and_the_peak_holds_more_than_the_state(compiled):
    data, fsdp = compiled["data"], compiled["fsdp"]
    assert data["state"] >= 3 * 4 * data["parameters"]  # parameters and two moments in float32
    assert fsdp["state"] < 0.2 * data["state"]
    for plan in (data, fsdp):
        assert plan["peak"] > plan["state"]
        assert plan["parameters"] == parameter_count(small_config().model)
        assert plan["tokens_per_step"] == 8 * 32
        assert plan["flops_per_token"] == 3 * small_config().model.flops_per_token(32)
    assert fsdp["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1, "context": 1}


def test_what_needs_more_than_a_device_has_does_not_fit(compiled):
    assert compiled["fsdp"]["fits"]
    assert describe(PLAN)[-1] == "fits: the step needs 4.00 GiB of the 16.00 GiB that a device has"
    large = replace(PLAN, peak=20 * GIB)
    assert not large.fits
    assert describe(large)[-1] == "does not fit: the step needs 20.00 GiB of the 16.00 GiB that a device has"
    refused = replace(PLAN, peak=20 * GIB, state=None, collectives=None)
    assert not refused.fits
    assert describe(refused)[-1].startswith("does not fit: the step needs at least 20.00 GiB of the 16.00 GiB")


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (27.50G) exceeds available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 27.50G of 15.75G hbm. Exceeded by 11.75G.",
    ],
)
def test_a_compiler_that_gives_up_says_how_much_it_wanted(message):
    assert planning._needed_and_available(message, V5E) == (27.5 * GIB, 15.75 * GIB)


def test_the_forms_that_collectives_have_on_tpus_and_gpus_are_read():
    program = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%less (state: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%turn (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %reduced = f32[4,8]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}

%until (state: (s32[], bf16[4,8])) -> pred[] {
  ROOT %ready = pred[] custom-call(%state)
}

%other (state: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %y = bf16[4,8]{1,0} get-tuple-element(%state), index=1
  %permuted = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]) collective-permute-start(%y), source_target_pairs={{0,1}}
}

%start_of_chain (a: f32[4,8]) -> (f32[4,8], u32[]) {
  %a = f32[4,8]{1,0} parameter(0)
  %chained = f32[4,64]{1,0} all-gather(%a), dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %begin = (f32[4,8]{1,0}, u32[]) custom-call(%chained), custom_call_target="AsyncCollectiveStart"
}

%link_of_chain (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %chained = f32[4,64]{1,0} all-gather(%a), dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %meanwhile = f32[4,8]{1,0} add(%a, %a)
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %q = bf16[4]{0} convert(%p)
  %start = ((f32[4,8]{1,0}, bf16[4]{0}), (f32[8,8]{1,0}, bf16[8]{0})) all-gather-start(%p, %q), dimensions={0}
  %done = (f32[8,8]{1,0}, bf16[8]{0}) all-gather-done(%start)
  %scattered = f32[2,8]{1,0} reduce-scatter(%p), to_apply=%add
  %alone = f32[4,8]{1,0} all-to-all(%p), replica_groups={{0},{1}}
  %alone_too = f32[4,8]{1,0} all-to-all(%p), replica_groups=[2,1]<=[2]
  %known = (s32[], f32[4,8]{1,0}) while(%init), condition=%less, body=%turn
  %begun = (f32[4,8], u32[]) fusion(%p), kind=kCustom, calls=%start_of_chain
  %going = f32[4,8] fusion(%begun), kind=kCustom, calls=%link_of_chain
  UNKNOWN
}
"""
    gathered = Collective("all-gather", 2, 8 * 8 * 4 + 8 * 2 + 4 * 64 * 4)
    reduced = Collective("all-reduce", 7, 7 * 4 * 8 * 4)
    scattered = Collective("reduce-scatter", 1, 4 * 8 * 4)
    found, known = collectives(program.replace("UNKNOWN", ""))
    assert (found, known) == ([gathered, reduced, scattered], True)
    loop = "%unknown = (s32[], bf16[4,8]) while(%init), condition=%until, body=%other"
    found, known = collectives(program.replace("UNKNOWN", loop))
    assert not known
    assert [(one.kind, one.count) for one in found][-1] == ("collective-permute", 1)
    annotated = loop + ', backend_config={"known_trip_count":{"n":"9"}}'
    found, known = collectives(program.replace("UNKNOWN", annotated))
    assert known
    assert found[-1].count == 9
    assert found[-1].bytes == pytest.approx(9 * 4 * 8 * 2, rel=0.1)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v9:4x8", "the device is one of v5e, v5p, v6e, h100, h200, as in v5e:4x8 and h200:8"),
        ("", "the device is one of"),
        ("v5e", "a slice of TPUs is named by its shape, as in v5e:4x8"),
        ("v5e:32", "a slice of TPUs is named by its shape"),
        ("v5e:0x4", "a slice of TPUs is named by its shape"),
        ("h200:2x4", "give the number of GPUs, as in h200:8"),
        ("h200:12", "above 8 they fill hosts of 8"),
    ],
)
def test_a_topology_that_is_none_is_one_line(name, says):
    with pytest.raises(InputError) as caught:
        make_plan(small_config(), name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "package"), [("v5e:4x8", "libtpu"), ("h200:8", "jax-cuda12-plugin")])
def test_without_the_compilers_it_says_what_to_install(monkeypatch, name, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"needs the package {package}; .*pip install 'tttlm\[plan\]'"):
        topologies.topology_devices(name)


def test_every_gpu_is_described_with_the_memory_that_the_table_of_devices_says():
    for device in DEVICES:
        if device.name in GPUS:
            assert f"device_memory_size: {device.memory}\n" in target_config(device)


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "train.py", *arguments], capture_output=True, text=True, timeout=1200, cwd=ROOT
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "model", "package"),
    [
        ("v5e:4x8", "ttt_linear_mamba", "libtpu"),
        ("v5e:4x8", "transformer", "libtpu"),
        ("h200:8", "ttt_linear_mamba", "jax_plugins.xla_cuda12"),
        ("h200:8", "transformer", "jax_plugins.xla_cuda12"),
    ],
)
def test_the_125m_step_compiles_for_devices_that_are_not_here_and_fits(topology, model, package):
    pytest.importorskip(package, reason=f"compiling for {topology} needs the extra: pip install 'tttlm[plan]'")
    done = train("--config", f"configs/125m/{model}.yaml", "--plan", topology)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("fits: ")
    assert "all-gather" in done.stdout


@pytest.mark.slow
def test_what_does_not_fit_fails_with_the_number():
    pytest.importorskip("libtpu", reason="compiling for TPUs needs the extra: pip install 'tttlm[plan]'")
    whole = ["--mesh.data", "4", "--mesh.fsdp", "1", "--batch_size", "4"]  # 13 GB of weights and moments, and more
    done = train("--config", "configs/1.3b/transformer.yaml", "--plan", "v5e:2x2", *whole)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1].startswith("does not fit: ")
