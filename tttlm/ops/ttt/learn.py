"""The public function: checks its arguments, reads the documents, and picks an implementation."""

import reprlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tttlm.errors import InputError
from tttlm.ops.documents import SegmentIds, document_in_progress, documents
from tttlm.ops.target import target_platform
from tttlm.ops.ttt.affine import Dual
from tttlm.ops.ttt.chunked import Chunked
from tttlm.ops.ttt.delta import Delta
from tttlm.ops.ttt.description import Learner, Ridge
from tttlm.ops.ttt.learner_state import LearnerInputs, LearnerState, blank, init_learner_state
from tttlm.ops.ttt.linear_scan import LinearScan
from tttlm.ops.ttt.problem import Implementation, Problem, Shapes
from tttlm.ops.ttt.reference import Reference
from tttlm.ops.varying import varying_like

# Fastest first: None picks the first that supports the learner.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "dual": Dual(),
    "delta": Delta(),
    "linear_scan": LinearScan(),
    "chunked": Chunked(),
    "reference": Reference(),
}


def learn(
    learner: Learner,
    inputs: LearnerInputs,
    weights: Any,
    *,
    slow: Any = None,
    position_scale: Float[Array, "M"] | None = None,
    state: LearnerState | None = None,
    segment_ids: SegmentIds = None,
    aligned: bool = False,
    on_boundary: bool = False,
    remat_chunks: int = 1,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], LearnerState]:
    """Trains every head's inner model on the tokens of a sequence, and applies it to the query of each token.

    `tttlm.ops.ttt.description` has the equations. Computation and state are in float32, or in float64 if any argument
    is float64.

    Args:
        learner: the description.
        inputs: queries, keys, values, rates and gates of every token and head.
        weights: initial weights of the inner model `[H, ...]`; new documents start from them.
        slow: slow parameters of the inner model `[H, ...]`, as the model reads them; `λ` `[H, K]` of `Ridge`.
        position_scale: factor of the step by the tokens since the anchor moved, `[anchor]`, if the optimiser has
            `position_scale`.
        state: state to continue from; None starts from `weights`, with all clocks at zero.
        segment_ids: documents of a sequence, 0 for padding (see `tttlm.ops.documents`), or the result of `documents`.
            Clocks count from the start of the sequence, regardless of documents.
        aligned: asserts that every document starts when all clocks are at zero, at a multiple of
            `learner.clocks.period`, which saves the cost of other documents; their outputs are undefined.
        on_boundary: asserts that all clocks of every sequence are at zero, as they are without a state, which saves the
            cost of other sequences; their outputs are undefined.
        remat_chunks: the backward pass stores the state before every so many chunks, and recomputes those between.
        implementation: name of one of `IMPLEMENTATIONS`; None picks the fastest that supports this learner.

    Returns:
        Outputs `[B, T, H, V]` in the dtype of the queries, and the state after the last token.

    Raises:
        InputError: the implementation is unknown or does not support this learner, or shapes do not match.
    """
    check(learner, inputs, weights, position_scale)
    if remat_chunks < 1:
        raise InputError(f"remat_chunks must be at least 1, got {remat_chunks}")
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves((inputs, weights, slow, position_scale)))
    cast = lambda tree: jax.tree.map(lambda a: a.astype(dtype), tree)
    (batch, _, _, key_dim), value_dim = inputs.queries.shape, inputs.values.shape[-1]
    weights, slow, position_scale, state = varying_like(
        (cast(weights), cast(slow), cast(position_scale), state), inputs.queries
    )
    at_start = state is None or on_boundary
    if state is None:
        state = varying_like(init_learner_state(learner, weights, batch, key_dim, value_dim), inputs.queries)
    docs = documents(segment_ids, state.document)
    problem = Problem(
        learner=learner,
        inputs=inputs,
        weights=weights,
        slow=slow,
        position_scale=position_scale,
        blank=varying_like(blank(learner, weights, key_dim, value_dim), inputs.queries),
        state=state,
        docs=docs,
        at_start=at_start,
        aligned=aligned,
        remat_chunks=remat_chunks,
    )
    chosen = choose(learner, _shapes(inputs), implementation)
    outputs, after = chosen(problem)
    after = after._replace(document=document_in_progress(state.document, docs))
    return outputs.astype(inputs.queries.dtype), after


def supported(learner: Learner, shapes: Shapes, device: str | None = None) -> dict[str, str | None]:
    """For every implementation, fastest first, None if it supports `learner`, or one line that says why not.

    Args:
        learner: the description.
        shapes: sizes of the tokens.
        device: "cpu", "gpu" or "tpu"; None is the target device.
    """
    device = target_platform() if device is None else device
    return {name: one.supports(learner, device, shapes) for name, one in IMPLEMENTATIONS.items()}


def check_choice(learner: Learner, shapes: Shapes, name: str | None) -> None:
    """Refuses an implementation that supports `learner` on no device.

    A configuration is made before the devices of a run are known, so this does not depend on a device.

    Raises:
        InputError: as `choose`, for the last device.
    """
    refused = None
    for device in ("gpu", "tpu", "cpu"):
        try:
            choose(learner, shapes, name, device)
            return
        except InputError as error:
            refused = error
    assert refused is not None
    raise refused


def choose(learner: Learner, shapes: Shapes, name: str | None, device: str | None = None) -> Implementation:
    """The implementation of that name, or the fastest that supports `learner` if it is None.

    Raises:
        InputError: the name is unknown, or the implementation does not support the learner; says why.
    """
    reasons = supported(learner, shapes, device)
    if name is None:
        name = next(name for name, reason in reasons.items() if reason is None)
    elif name not in reasons:
        raise InputError(f"implementation must be one of {list(reasons)} or None, got {reprlib.repr(name)}")
    elif reasons[name] is not None:
        raise InputError(f"implementation {name!r} cannot compute this learner: {reasons[name]}")
    return IMPLEMENTATIONS[name]


def _shapes(inputs: LearnerInputs) -> Shapes:
    batch, time, heads, key_dim = inputs.queries.shape
    return Shapes(batch, time, heads, key_dim, inputs.values.shape[-1])


def check(learner: Learner, inputs: LearnerInputs, weights: Any, position_scale: Float[Array, "M"] | None) -> None:
    """Raises `InputError` if arguments do not match the description or the queries."""
    batch, time, heads, size = inputs.queries.shape
    optimizer, written = learner.optimizer, time * learner.clocks.writes_per_token
    per_write, per_token = (batch, written, heads), (batch, time, heads)
    expected: dict[str, tuple[Any, tuple[int, ...] | None]] = {
        "keys": (inputs.keys, (*per_write, size)),
        "values": (inputs.values, (*per_write, inputs.values.shape[-1])),
        "error_keys": (inputs.error_keys, (*per_write, size) if learner.error_keys else None),
    }

    def gate(one: Any) -> tuple[int, ...] | None:
        return None if one is None else (*per_token, size) if one.per_channel else per_token

    expected["decay"] = (inputs.decay, gate(optimizer.decay))
    if isinstance(optimizer, Ridge):
        expected["rates"] = (inputs.rates, per_write)
    else:
        expected["momentum"] = (inputs.momentum, gate(optimizer.momentum))
        expected["step_size"] = (inputs.step_size, per_token if optimizer.step_size else None)
        scaled = optimizer.position_scale
        expected["position_scale"] = (position_scale, (learner.clocks.anchor or 1,) if scaled else None)
        if optimizer.rate == "matrix":
            for path, rate in jax.tree_util.tree_leaves_with_path(inputs.rates):
                expected[f"rates{jax.tree_util.keystr(path)}"] = (rate, per_write)
            structures: list[Any] = [jax.tree.structure(tree) for tree in (inputs.rates, weights)]
            if structures[0] != structures[1]:
                raise InputError("rates must be a tree like the weights if Optimizer.rate is 'matrix'")
        else:
            channel = {"value": (inputs.values.shape[-1],), "token": (learner.window,) if learner.window > 1 else ()}
            rates = None if optimizer.rate is None else (*per_write, *channel[optimizer.rate])
            expected["rates"] = (inputs.rates, rates)
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        expected[f"weights{jax.tree_util.keystr(path)}"] = (leaf, (heads, *leaf.shape[1:]))
    for name, (came, needed) in expected.items():
        shape = None if came is None else came.shape
        if shape != needed:
            raise InputError(f"{name} must have shape {needed} to go with queries {inputs.queries.shape}, got {shape}")
