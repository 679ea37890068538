"""Which models there are: the base by its names, and every prefix and LoRA over it; ``/v1/models``."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtune.serving.api.errors import ApiError
from glmtune.serving.api.fields.common import CommonFields
from glmtune.serving.api.state import ServingState

if TYPE_CHECKING:
    from glmtune.switch.rule import SwitchFacts

MAX_NEAREST = 5
"""Most names that an error lists."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A name that can be asked.

    Attributes:
        name: what it is asked by.
        adapter: of the engine; empty: the base.
        kind: ``base``, ``prefix`` or ``lora``.
        num_prefix_tokens: length of a prefix.
        switch: of an adapter that has one: how well it does.
    """

    name: str
    adapter: str = ""
    kind: str = "base"
    num_prefix_tokens: int = 0
    switch: SwitchFacts | None = None


def served_models(state: ServingState) -> list[ServedModel]:
    """Return all models, the base first."""
    base = [ServedModel(name) for name in state.names]
    held = [
        ServedModel(info.name, info.name, info.kind, info.num_tokens, info.switch)
        for info in state.engine.adapters
    ]
    return base + held


def find_model(state: ServingState, name: str | None) -> ServedModel:
    """Return the model of a name; None asks the default.

    Raises:
        ApiError: there is none, with the nearest names.
    """
    asked = name if name is not None else state.default_model or state.names[0]
    models = served_models(state)
    for model in models:
        if model.name == asked:
            return model
    names = [model.name for model in models]
    near = difflib.get_close_matches(asked, names, n=MAX_NEAREST, cutoff=0.5)
    guess = f" Did you mean {' or '.join(f'`{each}`' for each in near)}?" if near else ""
    listed = ", ".join(f"`{each}`" for each in names[:MAX_NEAREST])
    more = f" and {len(names) - MAX_NEAREST} more (GET /v1/models)" if len(names) > MAX_NEAREST else ""
    raise ApiError(
        f"The model `{asked[:100]}` does not exist.{guess} There are {listed}{more}.",
        status=404,
        code="model_not_found",
        param="model",
    )


def checked_strength(model: ServedModel, fields: CommonFields) -> float:
    """Return how much a model's prefix or LoRA is asked to count.

    Raises:
        ApiError: the model has no such thing.
    """
    found = 1.0
    for name, kind, what in (("prefix_strength", "prefix", "prefix"), ("adapter_scale", "lora", "LoRA")):
        strength: float | None = getattr(fields, name)
        if strength is None:
            continue
        if model.kind != kind:
            raise ApiError(
                f"`{name}` is {strength:g}, but `{model.name}` is a {model.kind} model without a {what}."
                f" Leave it out, or ask for a {what} by its name.",
                param=name,
                code="invalid_value",
            )
        found = strength
    return found


def listing(state: ServingState) -> dict[str, Any]:
    """Return the reply of ``/v1/models``."""
    return {"object": "list", "data": [_card(state, model) for model in served_models(state)]}


def one_model(state: ServingState, name: str) -> dict[str, Any]:
    """Return the reply of ``/v1/models/{name}``.

    Raises:
        ApiError: there is none of that name.
    """
    return _card(state, find_model(state, name))


def _card(state: ServingState, model: ServedModel) -> dict[str, Any]:
    card: dict[str, Any] = {
        "id": model.name,
        "object": "model",
        "created": state.created,
        "owned_by": "glmtune",
        "root": state.names[0],
        "parent": state.names[0] if model.adapter else None,
        "max_model_len": state.engine.max_context_tokens,
        "kind": model.kind,
    }
    if model.kind == "prefix":
        card["num_prefix_tokens"] = model.num_prefix_tokens
    if model.switch is not None:
        on, off = state.engine.stats().switched.get(model.adapter, (0, 0))
        card["switch"] = {**dataclasses.asdict(model.switch), "num_on": on, "num_off": off}
    return card
