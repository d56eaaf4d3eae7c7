"""The cases of published learners: float64 inputs, outputs, final states and gradients, read into descriptions."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

from tttlm.ops.ttt import published
from tttlm.ops.ttt.learn import learn
from tttlm.ops.ttt.learner_state import LearnerInputs
from tttlm.ops.ttt.models import NormedWeights, RidgeWeights, SwiGLUWeights
from tttlm.ops.ttt.neighbors import neighbor_writes
from tttlm.ops.ttt.state import InnerLayer, InnerNorm

FOLDER = Path(os.environ.get("TTTLM_VARIANT_CASES", Path(__file__).parents[1] / "fixtures" / "variants"))
NAMES = sorted(p.name for p in FOLDER.iterdir() if p.name != "ttt_e2e" and (p / "config.json").exists())


class Call(NamedTuple):
    """Arguments of `learn` for one learner; those of a case with several learners are summed."""

    inputs: LearnerInputs
    weights: Any
    slow: Any = None
    position_scale: Any = None


class Case:
    """One folder: what comes in by name, what has to come out, and the descriptions."""

    def __init__(self, name: str):
        self.config = json.loads((FOLDER / name / "config.json").read_text())
        self.h = self.config["hyperparameters"]
        self.variant = self.config["variant"]
        tensors = load_file(FOLDER / name / "case.safetensors")
        part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        self.given = {k: v for k, v in tensors.items() if k.startswith(("in/", "init/"))}
        self.out, self.cotangent, self.final = tensors["out"], tensors["cotangent"], part("final/")
        self.gradients = part("grad/")
        self.family, self.learners = self._describe()

    def _describe(self):
        h = self.h
        has = lambda name: f"in/{name}" in self.given
        hidden = (h["F"],) if h.get("F") else ()
        scale = h.get("query_scale", 1.0)
        match self.variant.split("_")[0]:
            case "ttt":
                return ttt_call, (published.ttt(hidden, h["chunk"], eps=h["eps"]),)
            case "linear" | "simple" | "gla":
                gate = {"gate": h["gate"] is not None, "per_channel": h["gate"] == "channel"}
                return linear_call, (published.linear_attention(scale, **gate),)
            case "deltanet" | "gated" | "kda" | "deltaproduct":
                gate = {"gate": h["gate"] is not None, "per_channel": h["gate"] == "channel"}
                writes = h.get("steps_per_token", 1)
                return linear_call, (published.delta_rule(scale, writes_per_token=writes, **gate),)
            case "comba":
                return linear_call, (published.comba(scale),)
            case "mesanet":
                return mesa_call, (published.mesanet(),)
            case "longhorn":
                return linear_call, (published.longhorn(diagonal=h["diagonal"]),)
            case "titans" if has("lr_logit"):
                memory = published.neural_memory(h["F"], h["chunk"], h["segment"], muon=h["muon"])
                return neural_memory_call, (memory,)
            case "titans":
                return titans_call, (published.titans(hidden, h["chunk"]),)
            case "lact":
                options = {k: h[k] for k in ("momentum", "muon", "prenorm")}
                return lact_call, (published.lact(h["F"], h["chunk"], **options),)
            case "inplace":
                return inplace_call, (published.inplace_ttt(h["chunk"]),)
            case "tnt":
                projection = {"chunk": "anchor", "shard": "reset"}[h["projection"]]
                sizes = (h["global_chunk"], tuple(h["local_chunks"]), tuple(h["local_shards"]))
                return tnt_call, published.tnt(hidden, *sizes, projection=projection)
            case "omeganet" | "atlas":
                if h["momentum"]:
                    return omega_call, (published.atlas(hidden, h["window"], h["chunk"], muon=h["muon"]),)
                return omega_call, (published.omega(hidden, h["window"], h["chunk"]),)
        raise ValueError(f"no description for {self.variant}")

    def run(self, given, **options):
        """Outputs and states for what comes in, `{"in/...": ..., "init/...": ...}`."""
        calls = self.family(self, given)
        results = [
            learn(d, c.inputs, c.weights, slow=c.slow, position_scale=c.position_scale, **options)
            for d, c in zip(self.learners, calls, strict=True)
        ]
        outputs = sum(out for out, _ in results)
        return outputs.reshape(self.out.shape), [state for _, state in results]


def kernels(given, prefix="init/", biases=False):
    """`W1, b1, W2, ...` (or `W`) as the layers of an MLP."""
    layers = []
    for i in ("", 1, 2, 3):
        if f"{prefix}W{i}" in given:
            layers.append(InnerLayer(given[f"{prefix}W{i}"], given.get(f"{prefix}b{i}")))
    return tuple(layers)


def tokens(given, **others):
    return LearnerInputs(given["in/q"], given["in/k"], given["in/v"], **others)


def ttt_call(case, given):
    norm = InnerNorm(given["in/norm_scale"], given["in/norm_bias"])
    return [Call(tokens(given, rates=given["in/lr"]), kernels(given), norm, given["in/token_scale"])]


def linear_call(case, given):
    gate, beta, p = (given.get(f"in/{name}") for name in ("g", "beta", "p"))
    return [Call(tokens(given, rates=beta, decay=gate, error_keys=p), kernels(given))]


def mesa_call(case, given):
    inputs = tokens(given, rates=given["in/beta"], decay=given["in/g"])
    return [Call(inputs, RidgeWeights(given["init/kk"], given["init/kv"]), given["in/ridge"])]


def titans_call(case, given):
    inputs = tokens(given, rates=given["in/theta"], momentum=given["in/eta"], decay=given["in/alpha"])
    return [Call(inputs, kernels(given))]


def neural_memory_call(case, given):
    rates = case.h["max_lr"] * jax.nn.sigmoid(given["in/lr_logit"])
    inputs = tokens(given, rates=rates, momentum=given["in/momentum_logit"], decay=given["in/decay_logit"])
    return [Call(inputs, NormedWeights(kernels(given), given["init/gamma"]))]


def swiglu(given, prefix):
    return SwiGLUWeights(*(given[f"{prefix}{i}"] for i in (0, 2, 1)))


def lact_call(case, given):
    inputs = tokens(given, rates=swiglu(given, "in/lr"), momentum=given.get("in/momentum"))
    return [Call(inputs, swiglu(given, "init/W"))]


def inplace_call(case, given):
    x, conv = given["in/x"], given["in/conv"]
    h = jax.nn.silu(x @ given["in/gate"]) * (x @ given["in/up"])
    keys, values, _ = neighbor_writes(h, x, conv, case.h["chunk"])
    values = values @ given["in/projection"]
    head = lambda a: a[:, :, None]
    rates = jnp.full((*keys.shape[:2], 1), case.h["lr"], x.dtype)
    return [Call(LearnerInputs(head(h), head(keys), head(values), rates), (InnerLayer(given["init/W"][None], None),))]


def tnt_call(case, given):
    calls = [Call(tokens(given, rates=given["in/lr_global"]), kernels(given, "init/global_"))]
    for i in range(len(case.h["local_chunks"])):
        calls.append(Call(tokens(given, rates=given[f"in/lr_local{i}"]), kernels(given, f"init/local{i}_")))
    return calls


def omega_call(case, given):
    inputs = tokens(
        given,
        rates=given["in/gamma"],
        momentum=given.get("in/theta"),
        decay=given["in/alpha"],
        step_size=given["in/eta"],
    )
    return [Call(inputs, kernels(given))]


def named_leaves(tree, prefix=""):
    """The leaves of a state's part by the names of the cases."""
    if isinstance(tree, NormedWeights):
        return named_leaves(tree.inner, prefix) | {f"{prefix}gamma": tree.scale}
    if isinstance(tree, SwiGLUWeights):
        return {f"{prefix}W0": tree.gate, f"{prefix}W1": tree.down, f"{prefix}W2": tree.up}
    if isinstance(tree, RidgeWeights):
        return {"kk": tree.kk, "kv": tree.kv}
    found = {}
    for i, layer in enumerate(tree, start=1):
        found |= {f"{prefix}W{i}": layer.kernel, f"{prefix}b{i}": layer.bias}
    return found | {f"{prefix}W": tree[0].kernel}


def final_parts(case, states, weights):
    """The final states by the names of the cases. `weights`: the initial ones, where the anchor never moves."""
    found = {}
    for i, state in enumerate(states):
        prefix = "" if len(states) == 1 else "global_" if i == 0 else f"local{i - 1}_"
        learner = case.learners[i]
        read = state.weights
        if learner.link is not None and not learner.keep_link:
            read = state.anchor
            found |= named_leaves(state.weights, f"{prefix}main_")
        found |= named_leaves(read, prefix)
        if state.momentum is not None:
            sign = -1 if case.variant.startswith("titans") else 1  # Titans adds S, which we subtract
            found |= named_leaves(jax.tree.map(lambda s, sign=sign: sign * s, state.momentum), f"{prefix}S_")
        if state.pending is not None:
            found |= named_leaves(state.pending.gradients, f"{prefix}sum_")
        start = state.anchor
        if start is None and learner.clocks.anchor is None:
            start = jax.tree.map(lambda w, s: jnp.broadcast_to(w, s.shape), weights[i], state.weights)
        found |= named_leaves(state.weights if start is None else start, f"{prefix}start_")
        if state.seen is not None:
            found[f"{prefix}seen"] = state.seen
    return {name: a for name, a in found.items() if a is not None}
