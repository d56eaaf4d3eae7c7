"""What a run has come to, in a few numbers, for its model card."""

from pathlib import Path

from tttlm.training.metrics import by_step, read_metrics
from tttlm.training.run_folder import RunFolder


def run_numbers(path: str | Path, step: int) -> dict[str, float | int | str]:
    """Names and values: what a run was trained on and with, and its losses up to a step.

    Raises:
        InputError: it is no run, or its files cannot be read.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    numbers: dict[str, float | int | str] = {
        "step": step,
        "sequences in a batch": config.batch_size,
        "tokens in a sequence": config.sequence_length,
        "optimizer": config.optimizer.name,
        "peak learning rate": config.optimizer.learning_rate,
        "seed": config.seed,
    }
    if not folder.metrics.is_file():
        return numbers
    records = read_metrics(folder.metrics)
    names = {"tokens_seen": "tokens seen", "loss": "training loss", "validation_loss": "held-out loss"}
    for name, label in names.items():
        points = by_step(records, name)
        points = points[points[:, 0] <= step]
        if len(points):
            at, value = int(points[-1, 0]), float(points[-1, 1])
            numbers[label if at == step else f"{label}, at step {at:,}"] = (
                int(value) if name == "tokens_seen" else value
            )
    return numbers
