"""Which engine runs a model: while one does, nobody else may compute with it.

An engine changes a model for the time of a pass (its attention, the layers of a LoRA) in a thread of its own.
A second thread in the same model at that time would get the wrong answer, and say so nowhere.
"""

from __future__ import annotations

from torch import nn

from glmtune.errors import ConfigError

_HELD = "_glmtune_is_held"


def hold_model(model: nn.Module) -> None:
    """Note that an engine's thread computes with a model from now on.

    Raises:
        ConfigError: another one does.
    """
    if is_held(model):
        raise ConfigError("Another engine runs this model already. Use that one, or stop it first.")
    setattr(model, _HELD, True)


def release_model(model: nn.Module) -> None:
    """Note that the model is free again."""
    setattr(model, _HELD, False)


def is_held(model: nn.Module) -> bool:
    """Whether an engine's thread computes with a model."""
    return bool(getattr(model, _HELD, False))


def check_not_held(model: nn.Module, call: str) -> None:
    """Refuse to compute with a model that an engine runs.

    Args:
        model: the causal LM.
        call: what was called, for the message.

    Raises:
        ConfigError: an engine runs it.
    """
    if is_held(model):
        raise ConfigError(
            f"`{call}` cannot run: an engine runs this model, and its thread alone may compute with it. Ask"
            " the engine (`ChatEngine.answer`, or `Engine.submit`), or stop it first."
        )
