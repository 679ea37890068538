"""How each release's `chat` draws tokens unless told otherwise; read by servers before PyTorch is there."""

from __future__ import annotations

from dataclasses import dataclass

from glmtune.models.releases.families import Family


@dataclass(frozen=True, slots=True)
class ChatDefaults:
    """What the `chat` of a release does where its caller says nothing.

    Attributes:
        max_length: prompt and answer together, tokens; never beyond the model's context.
        top_p: keep the likeliest tokens up to this sum.
        temperature: divides the logits.
    """

    max_length: int = 8192
    top_p: float = 0.8
    temperature: float = 0.8


# Numbers from the signatures of `chat` in the released modeling files; the long-context releases allow 32768.
_LATER, _LONG = ChatDefaults(), ChatDefaults(max_length=32768)
CHAT_DEFAULTS: dict[Family, ChatDefaults] = {
    Family.CHATGLM: ChatDefaults(max_length=2048, top_p=0.7, temperature=0.95),
    Family.CHATGLM2: _LATER,
    Family.CHATGLM2_32K: _LONG,
    Family.CODEGEEX2: _LATER,
    Family.CHATGLM3: _LATER,
    Family.CHATGLM3_32K: _LONG,
    Family.GLM4: _LATER,
    Family.TRANSFORMERS: _LATER,
}
