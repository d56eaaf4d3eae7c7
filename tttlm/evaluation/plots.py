"""Curves as PNG files, drawn without a display."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from tttlm.plot_style import tidy
from tttlm.training.metrics import by_step, read_metrics


def loss_curve(metrics: Path, png: Path) -> Path:
    """Draws training and held-out loss by step from a `metrics.jsonl` and returns the path of the picture."""
    records = read_metrics(metrics)
    trained = by_step(records, "loss")
    held_out = by_step(records, "validation_loss")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*trained.T, color="#b8cbe0", linewidth=0.8, label="training, each batch")
    if len(trained) > 20:
        window = max(len(trained) // 50, 5)
        smooth = np.convolve(trained[:, 1], np.ones(window) / window, mode="valid")
        axes.plot(trained[window - 1 :, 0], smooth, color="#2a5d9f", linewidth=1.6, label=f"mean of {window}")
    if len(held_out):
        axes.plot(*held_out.T, color="#c4472f", marker="o", markersize=4, linewidth=1.4, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    tidy(axes)
    axes.legend(frameon=False)
    figure.savefig(png, dpi=150)
    return png
