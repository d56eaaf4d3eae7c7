"""The model card of a model: README.md with the hub's metadata, the model's sizes, and results of a run."""

from collections.abc import Mapping

from tttlm.model import ModelConfig, parameter_count


def model_card(config: ModelConfig, *, name: str, numbers: Mapping[str, float | int | str] | None = None) -> str:
    """The text of a model card.

    Args:
        config: the model.
        name: its title.
        numbers: names and values of training and evaluation results.
    """
    mixers = ", ".join(dict.fromkeys(config.mixers))
    facts: dict[str, float | int | str] = {
        "parameters": parameter_count(config),
        "layers": config.num_layers,
        "sequence layers": mixers,
        "hidden size": config.hidden_size,
        "heads": config.num_heads,
        "feed-forward size": config.intermediate_size or "none",
        "vocabulary": config.vocab_size,
        "backbone": config.backbone,
        "dtype of the parameters": config.param_dtype,
    }
    if config.cache_length is not None:
        facts["tokens its attention cache has room for"] = config.cache_length
    parts = [
        "---",
        "library_name: tttlm",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in dict.fromkeys(("tttlm", "jax", *config.mixers))),
        "---",
        "",
        f"# {name}",
        "",
        f"A language model of {mixers} layers.",
        "",
        _table(facts),
        "",
        "```python",
        "import tttlm",
        "",
        f'model = tttlm.from_pretrained("{name}")',
        "logits = model(tokens)  # [B, T] -> [B, T, V]",
        "```",
    ]
    if numbers:
        parts += ["", "## Training", "", _table(numbers)]
    return "\n".join(parts) + "\n"


def _table(values: Mapping[str, float | int | str]) -> str:
    lines = ["| | |", "|---|---|"]
    for name, value in values.items():
        text = f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)
        lines.append(f"| {name} | {' '.join(text.split()).replace('|', '/')} |")
    return "\n".join(lines)
