"""What a mixer says a token costs is what its traced program computes."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tttlm.model import ModelConfig

TIME = 512
# Large enough for products to outweigh what is element-wise and small; nothing is computed, programs are traced only.
WIDE = ModelConfig(hidden_size=4096, num_heads=4, conv_kernel=32)
MIXERS = {
    "ttt_linear": {"ttt": {"mini_batch_size": 256}},
    "ttt_linear, shared queries and keys": {"ttt": {"mini_batch_size": 256, "share_qk": True, "gate": True}},
    "ttt_mlp": {"ttt": {"mini_batch_size": 128}},
    "attention": {"attention": {"implementation": "reference", "num_kv_heads": 2}},
    "sliding_attention": {"attention": {"implementation": "reference", "head_dim": 2048, "sliding_window": 300}},
    "mamba": {"mamba": {"state_size": 128, "dt_rank": 512}},
    "mamba2": {"mamba2": {"state_size": 512, "head_dim": 1024, "num_groups": 2}},
    "deltanet": {},
    "gated_deltanet": {},
    "kda": {},
    "gla": {},
    "deltaproduct": {},
    "comba": {},
    "mesanet": {},
    "longhorn": {"mixer_options": {"longhorn": {"rate_rank": 512}}},
    "titans": {},
    "titans, a memory with hidden units": {"mixer_options": {"titans": {"inner_size": 512}}},
    "titans_context": {"mixer_options": {"titans_context": {"chunk_size": 128}}},
    "lact": {},
    "tnt": {},
    "atlas": {},
    "inplace_ttt": {},
    "mamba2, longer chunks": {"mamba2": {"state_size": 512, "head_dim": 1024, "num_groups": 2, "chunk_size": 256}},
}


def operations(jaxpr) -> float:
    """Products and sums of a program, the bodies of loops as often as they turn; of branches the dearest."""
    total = 0.0
    for eqn in jaxpr.eqns:
        inside = [value for value in eqn.params.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = math.prod(eqn.invars[0].aval.shape[n] for n in contracted)
            total += eqn.outvars[0].aval.size * (2 * terms if contracted else 1)  # an outer product sums nothing
        elif eqn.primitive.name in ("mul", "add", "sub"):
            total += eqn.outvars[0].aval.size
        elif eqn.primitive.name == "triangular_solve":
            total += eqn.outvars[0].aval.size * eqn.invars[0].aval.shape[-1]
        elif eqn.primitive.name == "lu":
            total += 2 / 3 * eqn.outvars[0].aval.size * eqn.outvars[0].aval.shape[-1]
        elif eqn.primitive.name == "custom_linear_solve":
            total += operations(eqn.params["jaxprs"].solve.jaxpr)
        elif eqn.primitive.name == "cond":
            total += max(operations(branch.jaxpr) for branch in eqn.params["branches"])
        elif inside:
            turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            assert eqn.primitive.name != "while"
            total += turns * operations(getattr(inside[0], "jaxpr", inside[0]))
    return total


@pytest.mark.parametrize(
    "case",  # MesaNet's elimination is written out in products, which takes long to trace
    [pytest.param(case, marks=pytest.mark.long if case.startswith("mesanet") else ()) for case in MIXERS],
)
def test_the_formula_counts_the_operations_of_the_traced_program(case):
    name, changes = case.partition(",")[0], dict(MIXERS[case])
    options = changes.pop("mixer_options", {})
    sections = {section: replace(getattr(WIDE, section), **values) for section, values in changes.items()}
    mixer = replace(WIDE, mixers=(name,), backbone="transformer", mixer_options=options, **sections).pattern[0]
    graph, parameters = nnx.split(nnx.eval_shape(lambda: mixer.build(rngs=nnx.Rngs(0))))
    x = jax.ShapeDtypeStruct((1, TIME, WIDE.hidden_size), jnp.float32)
    counted = operations(jax.make_jaxpr(lambda p, x: nnx.merge(graph, p)(x))(parameters, x).jaxpr)
    if "attention" in name:  # all scores are computed, of which those that a query sees are counted
        distance = np.arange(TIME)[:, None] - np.arange(TIME)
        window = mixer.config.sliding_window if name == "sliding_attention" else TIME
        hidden = TIME**2 - np.sum((distance >= 0) & (distance < window))
        counted -= 4 * hidden * WIDE.num_heads * mixer.head_dim
    if name == "titans_context":  # two keys a token, of which half and one are seen
        counted -= 4 * TIME * (2 * 128 - 129) * WIDE.hidden_size
    assert mixer.flops_per_token(TIME) * TIME == pytest.approx(counted, rel=0.01)
