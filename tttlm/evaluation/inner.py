"""Changes the inner mini-batch size or inner learning rate of a trained model."""

from flax import nnx

from tttlm.errors import InputError
from tttlm.mixers import section_of
from tttlm.model import LanguageModel


def with_inner(
    model: LanguageModel, *, mini_batch_size: int | None = None, learning_rate_multiplier: float = 1.0
) -> LanguageModel:
    """The model with the same parameters and other settings of its inner models.

    Args:
        model: The model, bound to its parameters.
        mini_batch_size: Inner mini-batch size in tokens; None as in training.
        learning_rate_multiplier: Multiplier of the inner learning rate.

    Raises:
        InputError: No mixer of the model has these settings.
    """
    if mini_batch_size is None and learning_rate_multiplier == 1:
        return model
    config = model.config
    changes = {"mini_batch_size": mini_batch_size, "learning_rate_multiplier": learning_rate_multiplier}
    configs = {section_of(mixer.name): mixer.with_inner(**changes) for mixer in config.pattern}  # type: ignore[arg-type]
    if all(mixer.with_inner(**changes) == mixer.config for mixer in config.pattern):  # type: ignore[arg-type]
        raise InputError(
            f"a model of {', '.join(config.mixers)} has no inner mini-batches or learning rate to change: leave out "
            "--inner.mini_batch_size and --inner.learning_rate"
        )
    changed = config.with_mixer_configs(configs)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: LanguageModel(changed, rngs=nnx.Rngs(0))))
    wanted = {path: variable.shape for path, variable in nnx.to_flat_state(shapes)}

    def fitted(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        value = variable[...]
        if value.shape == wanted[path]:
            return variable
        mixer = changed.pattern[path[path.index("blocks") + 1]]
        inside = "/".join(map(str, path[path.index("mixer") + 1 :]))
        return variable.replace(mixer.resized(inside, value, wanted[path]))

    state = [(path, fitted(path, variable)) for path, variable in nnx.to_flat_state(nnx.state(model))]
    return nnx.merge(graph, nnx.from_flat_state(state))
