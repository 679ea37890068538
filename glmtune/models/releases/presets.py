"""Names that stand for a model: the embedded one and the official releases."""

from __future__ import annotations

from dataclasses import dataclass

from glmtune.models.releases.families import Family


@dataclass(frozen=True, slots=True)
class Preset:
    """One named model.

    Attributes:
        hub_id: repository on the hub; None for the model inside the package.
        family: its release line.
        summary: one line for listings.
    """

    hub_id: str | None
    family: Family
    summary: str


def _official(name: str, family: Family, summary: str) -> Preset:
    return Preset(f"zai-org/{name}", family, summary)


def _transformers(name: str, summary: str) -> Preset:
    return _official(name, Family.TRANSFORMERS, summary)


PRESETS: dict[str, Preset] = {
    "glm-tiny": Preset(
        None, Family.CHATGLM2, "the embedded model of a few million parameters; needs no download"
    ),
    "chatglm-6b": _official("chatglm-6b", Family.CHATGLM, "first generation, 6.2 billion parameters"),
    "chatglm2-6b": _official("chatglm2-6b", Family.CHATGLM2, "second generation, 6.2 billion parameters"),
    "chatglm2-6b-32k": _official(
        "chatglm2-6b-32k", Family.CHATGLM2_32K, "second generation, 32K tokens of context"
    ),
    "codegeex2-6b": _official("codegeex2-6b", Family.CODEGEEX2, "second generation, trained on code"),
    "chatglm3-6b": _official("chatglm3-6b", Family.CHATGLM3, "third generation, chat"),
    "chatglm3-6b-base": _official(
        "chatglm3-6b-base", Family.CHATGLM3, "third generation, not tuned for chat"
    ),
    "chatglm3-6b-32k": _official(
        "chatglm3-6b-32k", Family.CHATGLM3_32K, "third generation, 32K tokens of context"
    ),
    "chatglm3-6b-128k": _official(
        "chatglm3-6b-128k", Family.CHATGLM3_32K, "third generation, 128K tokens of context"
    ),
    "glm-4-9b": _official(
        "glm-4-9b", Family.GLM4, "fourth generation, 9.4 billion parameters, not tuned for chat"
    ),
    "glm-4-9b-chat": _official(
        "glm-4-9b-chat", Family.GLM4, "fourth generation, chat, 128K tokens of context"
    ),
    "glm-4-9b-chat-1m": _official(
        "glm-4-9b-chat-1m", Family.GLM4, "fourth generation, chat, 1M tokens of context"
    ),
    "glm-4-9b-chat-hf": _transformers(
        "glm-4-9b-chat-hf", "fourth generation, chat, 128K tokens of context, transformers' format"
    ),
    "glm-4-9b-0414": _transformers("GLM-4-9B-0414", "April 2025, 9.4 billion parameters, chat"),
    "glm-4-32b-0414": _transformers("GLM-4-32B-0414", "April 2025, 32.6 billion parameters, chat"),
    "glm-z1-9b-0414": _transformers("GLM-Z1-9B-0414", "April 2025, 9.4 billion parameters, thinks first"),
    "glm-z1-32b-0414": _transformers("GLM-Z1-32B-0414", "April 2025, 32.6 billion parameters, thinks first"),
    "glm-edge-1.5b-chat": _transformers("glm-edge-1.5b-chat", "1.6 billion parameters, chat, for laptops"),
    "glm-edge-4b-chat": _transformers("glm-edge-4b-chat", "4.3 billion parameters, chat, for laptops"),
}
