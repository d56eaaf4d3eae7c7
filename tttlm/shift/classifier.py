"""The classifier two-sample test: whether a classifier can distinguish held-out samples of A and B."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import special

from tttlm.errors import InputError
from tttlm.shift.estimate import CONFIDENCE, Estimate, normal_interval
from tttlm.shift.samples import Features, pair_of

Score = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ClassifierTest:
    """The results on held-out samples of a classifier that was trained to distinguish A from B.

    Attributes:
        accuracy: fraction of held-out samples that it classifies correctly, 0.5 by chance, with the Clopper-Pearson
            interval and the binomial p-value.
        auc: probability that it scores a sample of B above one of A, with DeLong's interval and the permutation
            p-value.
        accuracy_permutation_p: p-value of the accuracy when the held-out labels are permuted.
    """

    accuracy: Estimate
    auc: Estimate
    accuracy_permutation_p: float


def classifier_test(
    a: Any,
    b: Any,
    *,
    classifier: Literal["logistic", "mlp"] = "logistic",
    held_out: float = 0.5,
    l2: float = 1.0,
    hidden_size: int = 64,
    steps: int = 300,
    learning_rate: float = 1e-2,
    permutations: int = 999,
    features: Features | None = None,
    seed: int = 0,
) -> ClassifierTest:
    """Classifier two-sample test (Lopez-Paz and Oquab 2017, arXiv 1610.06545).

    Equally many samples of A and B are held out, so that chance is one half; the classifier is trained on the others,
    with equal weights of A and B. Features are standardised by the mean and standard deviation of the training samples.
    For the permutation p-values the classifier is fixed and the held-out labels are permuted. Accuracies of few
    held-out samples take few values, which makes both of their p-values conservative; that of the AUC is exact.

    Args:
        a, b: features `[N, D]` and `[M, D]`, or inputs for `features`.
        classifier: "logistic" for logistic regression, solved by Newton's method; "mlp" for one hidden layer of
            `hidden_size` GELUs, trained by `steps` full-batch steps of Adam.
        held_out: fraction of the smaller sample that is held out.
        l2: weight of the penalty `l2 / 2 |w|^2` that is added to the sum of the losses.
        hidden_size, steps, learning_rate: hidden size and training of the MLP.
        permutations: number of permutations; the smallest p-value is `1 / (1 + permutations)`.
        features: a model's features of a batch of inputs.
        seed: seed of the split, the MLP and the permutations.

    Raises:
        InputError: fewer than eight samples, an unknown classifier, or options out of range.
    """
    if classifier not in ("logistic", "mlp"):
        raise InputError(f"unknown classifier {classifier!r}; there are 'logistic' and 'mlp'")
    if not 0 < held_out < 1 or not l2 > 0 or permutations < 1:
        raise InputError(
            "held_out is between 0 and 1, l2 is positive and permutations are at least 1; "
            f"got held_out {held_out}, l2 {l2}, permutations {permutations}"
        )
    a, b = pair_of(a, b, features, 8)
    rng = np.random.default_rng(seed)
    test_size = min(max(round(held_out * min(len(a), len(b))), 2), min(len(a), len(b)) - 2)
    orders = rng.permutation(len(a)), rng.permutation(len(b))
    test = np.concatenate([x[order[:test_size]] for x, order in zip((a, b), orders, strict=True)])
    train = np.concatenate([x[order[test_size:]] for x, order in zip((a, b), orders, strict=True)])
    in_b = np.arange(len(train)) >= len(a) - test_size
    counts = np.array([np.count_nonzero(~in_b), np.count_nonzero(in_b)])
    weights = (len(train) / (2 * counts))[in_b.astype(int)].astype(train.dtype)
    labels = in_b.astype(train.dtype)
    mean, deviation = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    deviation = np.where(deviation > 0, deviation, 1)  # constant features become 0
    mean, deviation = mean.astype(train.dtype), deviation.astype(train.dtype)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    if classifier == "logistic":
        coefficients, intercept = logistic_regression(train, labels, weights, l2)
        scores = test @ coefficients + intercept
    else:
        scores = _mlp_scores(train, labels, weights, test, l2, hidden_size, steps, learning_rate, seed)
    return _held_out_test(scores.astype(np.float64), test_size, permutations, rng)


def logistic_regression(
    x: np.ndarray, labels: np.ndarray, weights: np.ndarray, l2: float
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients `[D]` and intercept that minimise `sum_i weights_i loss_i + l2 / 2 |coefficients|^2`.

    The loss is the logistic loss of `labels` in {0, 1}. It is minimised by Newton's method with step halving, until the
    decrease is below rounding errors.
    """
    found = np.asarray(_newton(x, labels, weights, l2))
    return found[:-1], found[-1]


@jax.jit
def _newton(x: jax.Array, labels: jax.Array, weights: jax.Array, l2: float) -> jax.Array:
    penalty = l2 * jnp.append(jnp.ones(x.shape[1], x.dtype), 1e-8)  # the intercept is not penalised
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def objective(beta):
        z = product(x, beta[:-1]) + beta[-1]
        return jnp.sum(weights * (jax.nn.softplus(z) - labels * z)) + jnp.sum(penalty * beta**2) / 2

    def newton_step(carry):
        beta, value, _, count = carry
        z = product(x, beta[:-1]) + beta[-1]
        p = jax.nn.sigmoid(z)
        residual, curvature = weights * (p - labels), weights * p * (1 - p)
        gradient = jnp.append(product(residual, x), residual.sum()) + penalty * beta
        edge = product(curvature, x)
        hessian = jnp.block(
            [[product(x.T * curvature, x), edge[:, None]], [edge[None], curvature.sum()[None, None]]]
        ) + jnp.diag(penalty)
        direction = jax.scipy.linalg.solve(hessian, gradient, assume_a="pos")
        _, beta_next = jax.lax.while_loop(
            lambda tried: (objective(tried[1]) > value) & (tried[0] > 1e-4),
            lambda tried: (tried[0] / 2, beta - tried[0] / 2 * direction),
            (jnp.ones((), x.dtype), beta - direction),
        )
        lower = objective(beta_next)
        better = lower < value
        tolerance = 4 * jnp.finfo(x.dtype).eps * value
        return (
            jnp.where(better, beta_next, beta),
            jnp.where(better, lower, value),
            better & (value - lower > tolerance),
            count + 1,
        )

    beta = jnp.zeros(x.shape[1] + 1, x.dtype)
    start = (beta, objective(beta), jnp.array(True), 0)
    return jax.lax.while_loop(lambda carry: carry[2] & (carry[3] < 50), newton_step, start)[0]


def _mlp_scores(train, labels, weights, test, l2, hidden_size, steps, learning_rate, seed) -> np.ndarray:
    key_in, key_out = jax.random.split(jax.random.key(seed))
    features = train.shape[1]
    parameters = {
        "w1": jax.random.normal(key_in, (features, hidden_size), train.dtype) / np.sqrt(features),
        "b1": jnp.zeros(hidden_size, train.dtype),
        "w2": jax.random.normal(key_out, (hidden_size,), train.dtype) / np.sqrt(hidden_size),
        "b2": jnp.zeros((), train.dtype),
    }
    return np.asarray(_mlp(_fit_mlp(parameters, train, labels, weights, l2, steps, learning_rate), test))


@jax.jit
def _mlp(parameters, x):
    return jax.nn.gelu(x @ parameters["w1"] + parameters["b1"]) @ parameters["w2"] + parameters["b2"]


@partial(jax.jit, static_argnames=("steps", "learning_rate"))
def _fit_mlp(parameters, x, labels, weights, l2, steps, learning_rate):
    """Compiled once for all pairs of samples of equal sizes."""
    optimizer = optax.adam(learning_rate)

    def loss(parameters):
        z = _mlp(parameters, x)
        penalty = l2 / 2 * (jnp.sum(parameters["w1"] ** 2) + jnp.sum(parameters["w2"] ** 2))
        return jnp.mean(weights * (jax.nn.softplus(z) - labels * z)) + penalty / len(x)

    def train_step(carry, _):
        parameters, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss)(parameters), opt_state)
        return (optax.apply_updates(parameters, updates), opt_state), None

    return jax.lax.scan(train_step, (parameters, optimizer.init(parameters)), None, length=steps)[0][0]


def _held_out_test(scores: np.ndarray, size: int, permutations: int, rng: np.random.Generator) -> ClassifierTest:
    """The tests on the scores `[2 size]` of held-out samples, those of A first."""
    below, above = scores[:size], scores[size:]
    total = 2 * size
    right = int(np.count_nonzero(below < 0) + np.count_nonzero(above >= 0))
    tail = (1 - CONFIDENCE) / 2
    accuracy = Estimate(
        right / total,
        float(special.betaincinv(right, total - right + 1, tail)) if right else 0.0,
        float(special.betaincinv(right + 1, total - right, 1 - tail)) if right < total else 1.0,
        # P(Binomial(total, 1/2) >= right)
        float(special.betainc(right, total - right + 1, 0.5)) if right else 1.0,
    )
    ranks = _mid_ranks(scores)
    auc = (ranks[size:].sum() / size - (size + 1) / 2) / size
    # DeLong, DeLong and Clarke-Pearson (1988): for each sample, the fraction ranked correctly against it.
    placed_b = (ranks[size:] - _mid_ranks(above)) / size
    placed_a = 1 - (ranks[:size] - _mid_ranks(below)) / size
    error = np.sqrt((placed_b.var(ddof=1) + placed_a.var(ddof=1)) / size)
    # right = B classified as B + A classified as A: both fall by one for a sample classified as B whose label becomes A
    predicted_b = scores >= 0
    reached_auc = reached_accuracy = 0
    for _ in range(permutations):
        chosen = rng.permutation(total)[size:]
        reached_auc += int(ranks[chosen].sum() >= ranks[size:].sum())
        reached_accuracy += int(np.count_nonzero(predicted_b[chosen]) >= np.count_nonzero(predicted_b[size:]))
    interval = normal_interval(auc, float(error), (1 + reached_auc) / (1 + permutations))
    clipped = Estimate(interval.value, max(interval.low or 0.0, 0.0), min(interval.high or 1.0, 1.0), interval.p_value)
    return ClassifierTest(accuracy, clipped, (1 + reached_accuracy) / (1 + permutations))


def _mid_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values have the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
