"""The extras of `tttlm` and their packages, for the message of a command that misses one."""

import importlib.util

_TRAIN = (
    *("optax", "orbax", "grain", "datasets", "pyarrow", "sentencepiece", "tokenizers", "tyro", "matplotlib", "yaml"),
    *("tqdm", "zstandard", "filelock"),
)
EXTRAS = {
    **dict.fromkeys(_TRAIN, "train"),
    "tensorboardX": "tensorboard",
    "wandb": "wandb",
    "mlxtend": "vision",
    "corrupt_tta": "vision",
    "ott": "shift",
    "lm_eval": "lm-eval",
    "huggingface_hub": "hub",
}


def advice(module: str) -> str | None:
    """One line on how to install the package of `module`; None if no extra has it."""
    name = module.partition(".")[0]
    if name not in EXTRAS:
        return None
    return f"this needs the package {name}, which is not installed: pip install 'tttlm[{EXTRAS[name]}]'"


def missing(*modules: str) -> str | None:
    """The advice for the first of the modules that is not installed; None if all are."""
    return next((advice(name) for name in modules if importlib.util.find_spec(name) is None), None)
