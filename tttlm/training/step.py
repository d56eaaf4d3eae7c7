"""One step of training as one compiled program, and the held-out loss beside it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh
from jaxtyping import Array, Bool, Float, Int

from tttlm.data import Batch
from tttlm.errors import InputError
from tttlm.model import LanguageModel, ModelConfig
from tttlm.ops.target import traced_for
from tttlm.training.carried import carried_shardings, carries_state, continued_state, initial_state
from tttlm.training.config import TrainConfig
from tttlm.training.devices import GIB, memory_of
from tttlm.training.loss import summed_loss
from tttlm.training.optimizer import at_step, inner_multiplier, learning_rate, make_optimizer
from tttlm.training.sharding import batch_sharding, tree_shardings


class TrainState(NamedTuple):
    """The complete state of a training run.

    Attributes:
        step: number of updates so far, including faulty ones.
        batch: the index of the next batch; larger than `step` after a rollback, which skips batches.
        params: nested dicts of arrays.
        opt_state: the optimiser's state.
        norm_mean: the running mean of the gradient norm, 0 before the first step.
        halted: whether a fault stopped the run; later steps then change nothing.
        carried: the state that examples continue from, see `tttlm.training.carried`; () if none is carried.
    """

    step: Int[Array, ""]
    batch: Int[Array, ""]
    params: Any
    opt_state: Any
    norm_mean: Float[Array, ""]
    halted: Bool[Array, ""]
    carried: Any = ()


class Model:
    """The language model as a function of its parameters, which are nested dicts of arrays."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        abstract = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
        parts: Any = nnx.split(abstract, nnx.Param, ...)
        self._graph, self._params, rest = parts
        if jax.tree.leaves(rest):
            raise ValueError(f"a language model has only parameters, got {nnx.to_pure_dict(rest).keys()}")

    @property
    def shapes(self) -> Any:
        """The parameters as `jax.ShapeDtypeStruct`s."""
        return nnx.to_pure_dict(self._params)

    def init(self, seed: int) -> Any:
        """The initial parameters."""
        return nnx.to_pure_dict(nnx.state(LanguageModel(self.config, rngs=nnx.Rngs(seed)), nnx.Param))

    def bind(self, params: Any) -> LanguageModel:
        """The language model with these parameters."""
        state = jax.tree.map(lambda x: x, self._params)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)


def init_state(config: TrainConfig, model: Model) -> TrainState:
    """The training state before the first update."""
    params = model.init(config.seed)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        batch=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(config).init(params),
        norm_mean=jnp.zeros((), jnp.float32),
        halted=jnp.zeros((), jnp.bool_),
        carried=initial_state(config, model.bind(params)),
    )


def abstract_state(config: TrainConfig, model: Model, mesh: Mesh | AbstractMesh) -> TrainState:
    """The training state as `jax.ShapeDtypeStruct`s with their shardings; nothing is computed."""
    shapes = jax.eval_shape(partial(init_state, config, model))
    shardings = tree_shardings(config.model, shapes, mesh)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings._replace(carried=carried_shardings(shapes.carried, mesh)),
    )


def check_memory(state: TrainState, mesh: Mesh) -> None:
    """Refuses a model whose training state is larger than the memory of a device, activations left aside.

    Args:
        state: from `abstract_state`.
        mesh: of real devices.

    Raises:
        InputError: the parameters, their gradient and the optimiser state do not fit.
    """
    stored = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    needed = sum(map(stored, jax.tree.leaves((state, state.params))))
    memory = memory_of(mesh.local_devices[0], len(mesh.local_devices))
    if memory is not None and needed > memory:
        raise InputError(
            f"parameters, gradient and optimiser state take {needed / GIB:,.1f} GiB of a device that has "
            f"{memory / GIB:,.1f}: make the model smaller, or shard it over more devices (`mesh`)"
        )


def make_init(config: TrainConfig, model: Model, mesh: Mesh) -> Callable[[], TrainState]:
    """Compiles the initialisation so that every array is created with its sharding."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, model, mesh))
    # It runs once, so it is compiled without optimisation, which on CPU takes a quarter of the time.
    quickly = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    return jax.jit(partial(init_state, config, model), out_shardings=shardings, compiler_options=quickly)


def make_train_step(
    config: TrainConfig, model: Model, mesh: Mesh
) -> Callable[[TrainState, Batch[Array]], tuple[TrainState, dict[str, Array]]]:
    """The compiled step: (state, batch) to (state, metrics). The buffers of the given state are donated.

    An update whose loss or gradient is not finite, or whose gradient norm spikes, is not applied; under any policy
    but `skip` no later update is applied either, so that the state before the fault is available for the report.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, model, mesh))
    # `continues` has no tokens to shard: each array of a batch of documents brings its own sharding.
    of_batch = None if config.data.layout == "documents" else batch_sharding(mesh)

    def step(state: TrainState, batch: Batch[Array]) -> tuple[TrainState, dict[str, Array]]:
        with traced_for(mesh.devices.flat[0]), use_abstract_mesh(mesh.abstract_mesh):
            return train_step(config, model, state, batch)

    return jax.jit(
        step,
        in_shardings=(shardings, of_batch),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )


def train_step(
    config: TrainConfig, model: Model, state: TrainState, batch: Batch[Array]
) -> tuple[TrainState, dict[str, Array]]:
    """One update on one batch; see `make_train_step`."""
    multiplier = inner_multiplier(config, state.step)
    loss, tokens, grads, carried = batch_gradient(config, model, state.params, batch, multiplier, state.carried)
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if config.faults.spike:
        good &= (state.norm_mean == 0) | (norm <= config.faults.spike * state.norm_mean)
    halted = state.halted | ~good if config.faults.policy != "skip" else state.halted
    apply = good & ~halted

    updates, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # If the update is not applied, examples continue from the state at the beginning of the step.
    before = continued_state(model.bind(state.params), state.carried, batch.continues) if carried else ()
    params, opt_state, carried = jax.tree.map(
        lambda new, old: jnp.where(apply, new, old),
        (params, opt_state, carried),
        (state.params, state.opt_state, before),
    )
    opt_state = at_step(opt_state, state.step + 1)
    norm_mean = jnp.where(state.norm_mean == 0, norm, 0.98 * state.norm_mean + 0.02 * norm)
    norm_mean = jnp.where(apply, norm_mean, state.norm_mean).astype(jnp.float32)
    metrics = {
        "loss": loss,
        "gradient_norm": norm,
        "parameter_norm": optax.tree.norm(params),
        "learning_rate": jnp.asarray(learning_rate(config)(state.step), jnp.float32),
        "inner_multiplier": multiplier,
        "tokens": tokens,
        "good": good,
    }
    return TrainState(state.step + 1, state.batch + 1, params, opt_state, norm_mean, halted, carried), metrics


def batch_gradient(
    config: TrainConfig,
    model: Model,
    params: Any,
    batch: Batch[Array],
    multiplier: Float[Array, ""],
    carried: Any = (),
) -> tuple[Float[Array, ""], Float[Array, ""], Any, Any]:
    """(mean loss over the weighted targets, their weight, gradient, state after), computed in `accumulate` parts."""
    parts = config.accumulate
    tokens = jnp.maximum(total_weight(batch), 1)

    def part_loss(params: Any, part: Batch[Array], carried: Any) -> tuple[Float[Array, ""], Any]:
        loss, carried = batch_loss(config, model, params, part, multiplier, carried)
        return loss / tokens, carried

    gradient = jax.value_and_grad(part_loss, has_aux=True)
    if parts == 1:
        (loss, carried), grads = gradient(params, batch, carried)
        return loss, tokens, grads, carried

    # Part i has the examples i, i + parts, ...: each device's examples stay on it.
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
    states = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, parts, *x.shape[2:]), 2, 0), carried
    )  # [parts, repeats, B / parts, ...]

    def add(total: Any, part: tuple[Batch[Array], Any]) -> tuple[Any, Any]:
        (loss, after), grads = gradient(params, *part)
        return jax.tree.map(jnp.add, total, (loss, grads)), after

    first = jax.tree.map(lambda x: x[0], (split, states))
    (loss, _), grads = jax.eval_shape(gradient, params, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, grads))
    (loss, grads), states = jax.lax.scan(add, zeros, (split, states))
    carried = jax.tree.map(lambda x, like: jnp.moveaxis(x, 0, 2).reshape(like.shape), states, carried)
    return loss, tokens, grads, carried


def batch_loss(
    config: TrainConfig,
    model: Model,
    params: Any,
    batch: Batch[Array],
    multiplier: Float[Array, ""] | float,
    carried: Any = (),
) -> tuple[Float[Array, ""], Any]:
    """The summed loss of the weighted targets in nats, and the state after the batch; () if none is carried."""
    bound = model.bind(params)
    inputs, segment_ids = batch.inputs, batch.segment_ids
    if carries_state(config):
        state = continued_state(bound, carried, batch.continues)
        hidden, carried = bound.extend_features(inputs, state, segment_ids, inner_learning_rate_multiplier=multiplier)
    else:
        hidden = bound.features(inputs, segment_ids, inner_learning_rate_multiplier=multiplier)
    return summed_loss(hidden, bound.output_embedding, batch.targets, batch.weights, config.loss_chunk), carried


def total_weight(batch: Batch[Array]) -> Float[Array, ""]:
    """The sum of the weights of the targets."""
    return jnp.asarray(batch.targets.size, jnp.float32) if batch.weights is None else jnp.sum(batch.weights)


def make_evaluation(
    config: TrainConfig, model: Model, mesh: Mesh
) -> Callable[[Any, Batch[Array], Any], tuple[tuple[Float[Array, ""], Float[Array, ""]], Any]]:
    """The compiled held-out loss of a batch: (parameters, batch, carried state) to its sums and the next state.

    The sums are the summed loss in nats and the weight of the targets.
    """

    def evaluate(params: Any, batch: Batch[Array], carried: Any) -> tuple[tuple[Array, Array], Any]:
        with use_abstract_mesh(mesh.abstract_mesh):
            loss, after = batch_loss(config, model, params, batch, 1.0, carried)
            return (loss, total_weight(batch)), after

    return jax.jit(evaluate)


def make_initial_state(config: TrainConfig, model: Model, mesh: Mesh) -> Callable[[Any], Any]:
    """The compiled function from parameters to the state before the first batch; () if none is carried."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, model, mesh).carried)
    return jax.jit(lambda params: initial_state(config, model.bind(params)), out_shardings=shardings)
