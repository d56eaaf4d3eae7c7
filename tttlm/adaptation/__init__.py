"""Test-time training of any Flax NNX model, which is adapted while it predicts (arXiv 1909.13231 and related work)."""

from tttlm.adaptation.adapter import Adapter, AdapterState, Objective
from tttlm.adaptation.alignment import Alignment, gradient_alignment, safe_step
from tttlm.adaptation.methods import (
    batch_statistics,
    cross_entropy,
    no_adaptation,
    parameters_of,
    tent,
    uda_ss,
)
from tttlm.adaptation.objectives import (
    denoising_objective,
    entropy_objective,
    masked_objective,
    on_random_crops,
    rotation_objective,
)
from tttlm.adaptation.streams import (
    Stream,
    continual,
    correlated_labels,
    episodic,
    errors,
    growing,
    mixed,
    run_stream,
)

__all__ = [
    "Adapter",
    "AdapterState",
    "Alignment",
    "Objective",
    "Stream",
    "batch_statistics",
    "continual",
    "correlated_labels",
    "cross_entropy",
    "denoising_objective",
    "entropy_objective",
    "episodic",
    "errors",
    "gradient_alignment",
    "growing",
    "masked_objective",
    "mixed",
    "no_adaptation",
    "on_random_crops",
    "parameters_of",
    "rotation_objective",
    "run_stream",
    "safe_step",
    "tent",
    "uda_ss",
]
