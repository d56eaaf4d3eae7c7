"""Training of a Y-shaped classifier on labelled images, on the main loss or jointly on the self-supervised loss."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from tttlm.adaptation.adapter import Objective, split
from tttlm.adaptation.methods import cross_entropy
from tttlm.adaptation.objectives import on_random_crops
from tttlm.errors import InputError
from tttlm.progress import progress_bar
from tttlm.ranges import Count, NonNegativeFloat, PositiveFloat, Range, SizeOrZero
from tttlm.training.checkpoints import Checkpoints
from tttlm.training.config import CheckpointConfig
from tttlm.training.interrupts import PREEMPTED, catch_interrupts


@dataclass(frozen=True)
class JointConfig:
    """Configuration of training by stochastic gradient descent with momentum, as in arXiv 1909.13231."""

    epochs: Count = 150
    """Number of passes over the training images."""
    batch_size: Count = 128
    """Number of images in a batch."""
    self_supervised_batch: Count | None = None
    """Number of images of each batch on which the self-supervised loss is computed; None takes all."""
    learning_rate: PositiveFloat = 0.1
    """Initial learning rate."""
    milestones: tuple[Annotated[float, Range(above=0, below=1)], ...] = (0.5, 0.8333)
    """Fractions of the training after which the learning rate is divided by ten."""
    momentum: Annotated[float, Range(least=0, below=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: NonNegativeFloat = 5e-4
    """Weight decay, added to the gradient."""
    padding: SizeOrZero = 4
    """Training images are shifted by up to this many pixels."""
    flip: bool = True
    """Whether training images are mirrored at random."""
    checkpoint_every: Count = 2000
    """Steps between two checkpoints. The last step and an interrupted one are saved as well."""


def train_jointly(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    objective: Objective | None,
    images: Float[np.ndarray, "N S S C"],
    labels: Int[np.ndarray, "N"],
    config: JointConfig,
    folder: Path,
    *,
    seed: int = 0,
    description: str = "training",
) -> Any:
    """Trains a model, resumes a stopped training of this folder, or reads a finished one.

    The loss is the sum of the main loss and the self-supervised loss (equation 1 of arXiv 1909.13231).
    Ctrl-C and SIGTERM save a checkpoint first.

    Args:
        make_model: makes the model from random number generators.
        objective: the self-supervised loss; None trains on the main loss alone.
        images, labels: the training set.
        config: the configuration of the training.
        folder: the folder of the checkpoints.
        seed: seed of parameters, order and augmentation.
        description: label of the progress bar.

    Returns:
        The trained model; its BatchNorms use the statistics of training.

    Raises:
        KeyboardInterrupt: the training was stopped by Ctrl-C and saved; call again to resume. SIGTERM is raised again
            after it was saved.
    """
    per_epoch = len(images) // config.batch_size
    if not per_epoch:
        raise InputError(f"{len(images)} training images are fewer than a batch of {config.batch_size}")
    steps = per_epoch * config.epochs
    graph, params, rest = split(_training_mode(nnx.jit(lambda: make_model(nnx.Rngs(seed)))()), nnx.Param)
    cuts = {int(steps * part): 0.1 for part in config.milestones}
    optimizer = optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(optax.piecewise_constant_schedule(config.learning_rate, cuts), momentum=config.momentum),
    )
    crops = on_random_crops(lambda model, crops, key: crops, copies=1, padding=config.padding, flip=config.flip)

    def loss(params: Any, rest: Any, inputs: Array, labels: Array, key: Array) -> Any:
        model = nnx.merge(graph, params, rest, copy=True)
        crop_key, task_key = jax.random.split(key)
        inputs = crops(None, inputs, crop_key)
        total = cross_entropy(model, inputs, labels)
        if objective is not None:
            total += objective(model, inputs[: config.self_supervised_batch], task_key)
        return total, nnx.state(model, nnx.Not(nnx.Param))

    @jax.jit
    def train_step(params: Any, carried: Any, inputs: Array, labels: Array, key: Array) -> Any:
        opt_state, rest = carried
        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(params, rest, inputs, labels, key)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), (opt_state, rest), value

    carried = (optimizer.init(params), rest)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder, CheckpointConfig(every=config.checkpoint_every, keep_last=1))
    newest = checkpoints.newest(_pure(_abstract(params)), _pure(_abstract(carried)))
    start, stop = 0, False
    if newest:
        start, params, carried = newest.step, _like(params, newest.params), _like(carried, newest.rest)
    key = jax.random.key(seed)
    with catch_interrupts() as interrupts, progress_bar(steps, description, initial=start) as bar:
        for step in range(start, steps):
            epoch, batch = divmod(step, per_epoch)
            if step == start or batch == 0:
                order = np.random.default_rng((seed, epoch)).permutation(len(images))
            some = order[batch * config.batch_size : (batch + 1) * config.batch_size]
            params, carried, value = train_step(
                params, carried, images[some], labels[some], jax.random.fold_in(key, step)
            )
            bar.update(1)
            done, stop = step + 1, interrupts.stop()
            if stop or done == steps or done % config.checkpoint_every == 0:
                checkpoints.wait()
                checkpoints.save(done, _pure(params), _pure(carried), {"loss": float(value)})
            if stop:
                break
    if stop:
        checkpoints.close()
        if interrupts.status == PREEMPTED:
            signal.raise_signal(signal.SIGTERM)  # for the handler of the program, which has its own status for it
        raise KeyboardInterrupt
    checkpoints.wait()
    checkpoints.close()
    model = nnx.merge(graph, params, carried[1])
    if any(isinstance(module, nnx.BatchNorm) for _, module in nnx.iter_modules(model)):
        model.set_attributes(nnx.BatchNorm, use_running_average=True)
    return model


def _training_mode(model: nnx.Module) -> nnx.Module:
    if any(isinstance(module, nnx.BatchNorm) for _, module in nnx.iter_modules(model)):
        model.set_attributes(nnx.BatchNorm, use_running_average=False)
    return model


def _pure(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, as a checkpoint stores them."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _like(tree: Any, pure: dict[str, Any]) -> Any:
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), [jnp.asarray(pure[path]) for path in paths])


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
