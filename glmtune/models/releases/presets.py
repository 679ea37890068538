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
}
