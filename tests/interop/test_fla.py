"""Folders of flash-linear-attention: their logits, token after token in NumPy, and out as they came in."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tttlm
from tttlm.errors import InputError

D, H, K, V, F, LAYERS, VOCAB, TIME = 16, 2, 4, 8, 24, 2, 29, 7
SIZES = {"expand_k": H * K / D, "expand_v": H * V / D}
HEADS = {"head_dim": K, "expand_v": V / K}
MODELS = {
    "delta_net": {**SIZES, "allow_neg_eigval": True, "use_gate": True},
    "delta_net plain": {**SIZES, "use_short_conv": False},
    "gated_deltanet": HEADS,
    "kda": HEADS,
    "kda bounded": {**HEADS, "safe_gate": True, "lower_bound": -5.0},
    "gla": {**SIZES, "tie_word_embeddings": True},
    "gla conv": {**SIZES, "use_short_conv": True},
}


def shapes(kind: str, values: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of one block, as PyTorch keeps them."""
    found = {"q_proj.weight": (H * K, D), "k_proj.weight": (H * K, D), "v_proj.weight": (H * V, D)}
    found |= {"o_proj.weight": (D, H * V), ("g_norm_swish_gate" if kind == "gla" else "o_norm") + ".weight": (V,)}
    if values.get("use_short_conv", kind != "gla"):
        found |= {f"{c}_conv1d.weight": (H * size, 1, 4) for c, size in (("q", K), ("k", K), ("v", V))}
    if kind != "gla":
        found["b_proj.weight"] = (H, D)
    if kind == "gated_deltanet":
        found |= {"a_proj.weight": (H, D), "A_log": (H,), "dt_bias": (H,)}
    if kind == "kda":
        found |= {"f_proj.0.weight": (V, D), "f_proj.1.weight": (H * K, V), "A_log": (H,), "dt_bias": (H * K,)}
        found |= {"g_proj.0.weight": (V, D), "g_proj.1.weight": (H * V, V), "g_proj.1.bias": (H * V,)}
    elif values.get("use_gate", kind != "delta_net"):
        found["g_proj.weight"] = (H * V, D)
    if kind == "gla":
        found |= {"gk_proj.0.weight": (16, D), "gk_proj.1.weight": (H * K, 16), "gk_proj.1.bias": (H * K,)}
    block = {f"attn.{name}": shape for name, shape in found.items()}
    block |= {"attn_norm.weight": (D,), "mlp_norm.weight": (D,), "mlp.down_proj.weight": (D, F)}
    return block | {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D)}


def make(folder, name: str) -> tuple[str, dict, dict]:
    """A folder with random weights: its kind, its configuration and its tensors."""
    kind, rng = name.split()[0], np.random.default_rng(0)
    values = {"model_type": kind, "vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": LAYERS, "num_heads": H}
    values |= {"intermediate_size": F, "norm_eps": 1e-5, **MODELS[name]}
    all_shapes = {"model.embeddings.weight": (VOCAB, D), "model.norm.weight": (D,)}
    if not values.get("tie_word_embeddings"):
        all_shapes["lm_head.weight"] = (VOCAB, D)
    for i in range(LAYERS):
        all_shapes |= {f"model.layers.{i}.{n}": shape for n, shape in shapes(kind, values).items()}
    tensors = {n: rng.normal(size=shape).astype(np.float32) for n, shape in all_shapes.items()}
    for n, tensor in tensors.items():
        tensors[n] = tensor * 0.5 + ("norm" in n)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values))
    return kind, values, tensors


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms_norm(x, weight):
    return weight * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5)


def attend(kind, values, w, x):
    """One layer `[T, D]`, its weights updated token after token."""

    def channels(c):
        a = x @ w[f"{c}_proj.weight"].T
        if f"{c}_conv1d.weight" in w:
            padded = np.concatenate([np.zeros((3, a.shape[1])), a])
            taps = w[f"{c}_conv1d.weight"][:, 0]
            a = np.stack([np.sum(padded[t : t + 4].T * taps, axis=1) for t in range(len(x))])
        elif kind == "gla":
            return a.reshape(len(x), H, -1)
        return silu(a).reshape(len(x), H, -1)

    q, k, v = (channels(c) for c in "qkv")
    rate, decay = np.ones((len(x), H)), np.ones((len(x), H, K))
    if kind != "gla":
        q, k = (a / np.sqrt(np.sum(a * a, -1, keepdims=True) + 1e-6) for a in (q, k))
        rate = sigmoid(x @ w["b_proj.weight"].T) * (2 if values.get("allow_neg_eigval") else 1)
    if kind == "gated_deltanet":
        steps = np.log1p(np.exp(x @ w["a_proj.weight"].T + w["dt_bias"]))
        decay = decay * np.exp(-np.exp(w["A_log"]) * steps)[..., None]
    elif kind == "kda":
        logits = (x @ w["f_proj.0.weight"].T @ w["f_proj.1.weight"].T + w["dt_bias"]).reshape(len(x), H, K)
        scale = np.exp(w["A_log"])[:, None]
        bound = values.get("lower_bound")
        decay = np.exp(-scale * np.log1p(np.exp(logits)) if bound is None else bound * sigmoid(scale * logits))
    elif kind == "gla":
        logits = x @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
        decay = (sigmoid(logits) ** (1 / 16)).reshape(len(x), H, K)
    out = np.zeros((len(x), H, V))
    for h in range(H):
        state = np.zeros((K, V))
        for t in range(len(x)):
            state = decay[t, h][:, None] * state
            error = v[t, h] if kind == "gla" else v[t, h] - k[t, h] @ state
            state = state + rate[t, h] * np.outer(k[t, h], error)
            out[t, h] = q[t, h] @ state / np.sqrt(K)
    out = rms_norm(out, w["g_norm_swish_gate.weight" if kind == "gla" else "o_norm.weight"])
    if kind == "kda":
        gate = sigmoid(x @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T + w["g_proj.1.bias"])
        out = out * gate.reshape(out.shape)
    elif "g_proj.weight" in w:
        out = out * silu(x @ w["g_proj.weight"].T).reshape(out.shape)
    return out.reshape(len(x), -1) @ w["o_proj.weight"].T


def reference(kind, values, tensors, tokens):
    """Logits `[T, VOCAB]`."""
    tensors = {name: a.astype(np.float64) for name, a in tensors.items()}
    h = tensors["model.embeddings.weight"][tokens]
    for i in range(LAYERS):
        inside = lambda part, i=i: {
            n.removeprefix(f"model.layers.{i}.{part}"): a
            for n, a in tensors.items()
            if n.startswith(f"model.layers.{i}.{part}")
        }
        block, mlp = inside(""), inside("mlp.")
        h = h + attend(kind, values, inside("attn."), rms_norm(h, block["attn_norm.weight"]))
        x = rms_norm(h, block["mlp_norm.weight"])
        h = h + (silu(x @ mlp["gate_proj.weight"].T) * (x @ mlp["up_proj.weight"].T)) @ mlp["down_proj.weight"].T
    head = tensors.get("lm_head.weight", tensors["model.embeddings.weight"])
    return rms_norm(h, tensors["model.norm.weight"]) @ head.T


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_definition_and_the_folder_goes_out_as_it_came_in(name, tmp_path, x64):
    kind, values, tensors = make(tmp_path, name)
    tokens = np.random.default_rng(1).integers(VOCAB, size=TIME)
    model = tttlm.from_pretrained(tmp_path, param_dtype="float64")
    expected = reference(kind, values, tensors, tokens)
    logits = jax.jit(lambda t: model(t))(jnp.asarray(tokens)[None])[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
    tttlm.save_pretrained(model, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == set(tensors)
    assert all(np.array_equal(after[n], tensors[n]) for n in tensors)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in values} == values


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("delta_net", {"qk_norm": "sum"}, "qk_norm must be 'l2', got 'sum'"),
        ("delta_net", {"attn": {"layers": [0]}}, "attn is not supported"),
        ("gated_deltanet", {"num_v_heads": 4}, "num_v_heads must be num_heads, 2, or left out, got 4"),
        ("kda", {"safe_gate": True}, "safe_gate must be False, got True"),
        ("kda", {"lower_bound": 5.0}, "lower_bound must be a negative number, got 5.0"),
        ("gla", {"clamp_min": -1.0}, "clamp_min is not supported"),
        ("gla", {"use_short_conv": True}, "conv1d.weight' is missing"),
        ("gated_deltanet", {"use_gate": False}, "g_proj.weight' is no part of the model"),
    ],
)
def test_a_field_that_asks_for_another_computation_is_honoured_or_refused(name, changes, message, tmp_path):
    make(tmp_path, name)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=message) as error:
        tttlm.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
