"""Time and memory of every measure of shift on two large samples, each in a process of its own.

    python benchmarks/shift.py                                              # 100,000 samples of 1,000 features: hours
    python benchmarks/shift.py --measures mmd sliced_wasserstein --samples 20000

The samples are two normal distributions whose means are 0.02 apart in every feature. Each measure prints one line of
JSON: its estimate, seconds of the clock and of the processor, and the largest memory of the process.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import tyro

from tttlm import shift


def _labels(logits: np.ndarray) -> np.ndarray:
    """Classes of which the largest logit names about half."""
    return logits[:, : logits.shape[1] // 2].argmax(1)


MEASURES = {
    "linear_time_mmd": shift.linear_time_mmd,
    "classifier_test": lambda a, b: shift.classifier_test(a, b).accuracy,
    "classifier_test_mlp": lambda a, b: shift.classifier_test(a, b, classifier="mlp").accuracy,
    "sliced_wasserstein": shift.sliced_wasserstein,
    "gaussian_divergence": lambda a, b: shift.gaussian_divergence(a, b).forward,
    "frechet_distance": shift.frechet_distance,
    "gaussian_wasserstein": shift.gaussian_wasserstein,
    "confidence_drop": shift.confidence_drop,
    "entropy_rise": shift.entropy_rise,
    "average_thresholded_confidence": lambda a, b: shift.average_thresholded_confidence(a, _labels(a), b),
    "difference_of_confidences": lambda a, b: shift.difference_of_confidences(a, _labels(a), b),
    "mmd": shift.mmd,
    "nearest_neighbour_divergence": lambda a, b: shift.nearest_neighbour_divergence(a, b).forward,
    "entropic_wasserstein": shift.entropic_wasserstein,
}


@dataclass(frozen=True)
class Arguments:
    """Times the measures of shift."""

    measures: tuple[str, ...] = tuple(MEASURES)[:-1]
    """Names of measures; entropic_wasserstein is not among the default ones, because it takes days at this size."""
    samples: int = 100_000
    """Number of samples of each side."""
    features: int = 1000
    """Number of features."""


def main(arguments: Arguments) -> None:
    """Measures in this process if one measure is named, else each in a process of its own."""
    if len(arguments.measures) > 1:
        for name in arguments.measures:
            sizes = "--samples", str(arguments.samples), "--features", str(arguments.features)
            subprocess.run([sys.executable, __file__, "--measures", name, *sizes], check=True)
        return
    (name,) = arguments.measures
    rng, shape = np.random.default_rng(0), (arguments.samples, arguments.features)
    a = rng.standard_normal(shape, np.float32)
    b = rng.standard_normal(shape, np.float32) + np.float32(0.02)
    before, start = _cpu_seconds(), time.perf_counter()
    found = MEASURES[name](a, b)
    record = {
        "measure": name,
        "samples": arguments.samples,
        "features": arguments.features,
        "estimate": [found.value, found.low, found.high, found.p_value],
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(_cpu_seconds() - before, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(record), flush=True)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main(tyro.cli(Arguments))
