"""The fields of ``POST /``, as ``api.py`` of ChatGLM-6B and ChatGLM2-6B reads them.

Source:
    ``api.py`` of THUDM/ChatGLM-6B and THUDM/ChatGLM2-6B.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from glmtune.inference.settings import MAX_TEMPERATURE
from glmtune.serving.api.fields.common import broken_rule

OFFICIAL_MAX_LENGTH = 2048
OFFICIAL_TOP_P = 0.7
OFFICIAL_TEMPERATURE = 0.95


def _history(value: object) -> list[Any]:
    if not value:
        return []
    if isinstance(value, list):
        if all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in value):
            return value
        if all(
            isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
            for turn in value
        ):
            return value
    raise broken_rule("must be a list of [question, answer] pairs, or of messages with `role` and `content`")


History = Annotated[
    list[Any],
    BeforeValidator(_history),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2},
                },
                {"type": "array", "items": {"type": "object", "required": ["role"]}},
                {"type": "null"},
            ]
        }
    ),
]


class OriginalFields(BaseModel):
    """What ``POST /`` takes; what is missing, null or 0 is the official default."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    prompt: str = Field(description="the question")
    history: History = Field(default_factory=list, description="earlier turns, oldest first")
    max_length: int | None = Field(None, ge=0, description="most tokens of prompt and answer; default 2048")
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False, description="default 0.7")
    temperature: float | None = Field(
        None, ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False, description="default 0.95"
    )

    @property
    def is_paired(self) -> bool:
        """Whether the history holds pairs."""
        return bool(self.history) and isinstance(self.history[0], list)
