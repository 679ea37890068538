"""Fields that are not of a route: some change nothing, some cannot be obeyed, the rest nobody knows."""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from glmtune.serving.api.errors import ApiError
from glmtune.serving.api.fields.body import shown_value

LOGGER = logging.getLogger(__name__)
IGNORED_HEADER = "x-glmtune-ignored-fields"

ACCEPTED = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields of OpenAI's that change no answer here: who asks, what to remember, what to pay."""

_TOKENS = "Use `max_tokens`."
_GREEDY = 'Use `"temperature": 0` for the likeliest tokens.'
_FREE = "Answers are not bound to a form here: ask for it in the messages, and check what comes."
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "add_special_tokens": (
        (True,),
        "Send token ids where the prompt must not begin as the model's inputs do.",
    ),
    "audio": ((), "Answers are text."),
    "best_of": ((1,), "Use `n`, and choose among the answers."),
    "chat_template": ((), "Messages are written as the release was trained on."),
    "chat_template_kwargs": (({},), "Messages are written as the release was trained on."),
    "do_sample": ((True,), _GREEDY),
    "early_stopping": ((False,), "There is no beam search here."),
    "echo": ((False,), "Use /v1/completions."),
    "function_call": (("auto",), "Use `tools` and `tool_choice`."),
    "functions": (([],), 'Use `tools`: each function as {"type": "function", "function": ...}.'),
    "grammar": (("",), _FREE),
    "guided_choice": (([],), _FREE),
    "guided_grammar": (("",), _FREE),
    "guided_json": (({}, ""), _FREE),
    "guided_regex": (("",), _FREE),
    "include_stop_str_in_output": ((False,), "Stop texts are left out of answers."),
    "json_schema": (({},), _FREE),
    "length_penalty": ((1, 0), "There is no beam search here."),
    "max_length": ((), f"{_TOKENS} It counts the answer alone."),
    "max_new_tokens": ((), _TOKENS),
    "min_tokens": ((0,), "Use `ignore_eos` with `max_tokens` for answers of a fixed length."),
    "mirostat": ((0,), "Use `top_p`, `top_k` or `min_p`."),
    "modalities": ((["text"], []), "Answers are text."),
    "moderation": ((), "Answers are not moderated here."),
    "no_repeat_ngram_size": ((0,), "Use `repetition_penalty` or `frequency_penalty`."),
    "num_beams": ((1,), "There is no beam search here."),
    "prediction": ((), "Leave it out."),
    "prompt_logprobs": ((0, False), 'Use /v1/completions with `"echo": true` and `logprobs`.'),
    "reasoning_effort": (("none",), "These models do not reason apart from their answer."),
    "regex": (("",), _FREE),
    "response_format": (({"type": "text"},), _FREE),
    "skip_special_tokens": ((True,), "Command tokens never stand in answers."),
    "spaces_between_special_tokens": ((True,), "Command tokens never stand in answers."),
    "stop_token_ids": (([],), "Use `stop`, in text."),
    "structured_outputs": (({},), _FREE),
    "suffix": (("",), "These models continue a text; they do not fill one in."),
    "top_a": ((0,), "Use `min_p`."),
    "truncate_prompt_tokens": ((), "Shorten the prompt yourself: what is dropped changes the answer."),
    "typical_p": ((1,), "Use `top_p` or `min_p`."),
    "use_beam_search": ((False,), "There is no beam search here."),
    "verbosity": (("medium",), "Say in the messages how long the answer should be."),
    "web_search_options": ((), "Nothing is searched here."),
}
"""Fields that would change an answer and cannot be obeyed: values that ask for nothing, and the way out."""

MAX_REMEMBERED = 1000
"""Most names that are logged once each: a client may send a new one every time."""
_logged: set[str] = set()


def unknown_fields(fields: BaseModel, *, strict: bool) -> list[str]:
    """Return the names of fields that nobody knows.

    Args:
        fields: of a request, its other fields in ``model_extra``; those of objects in it count too.
        strict: refuse them.

    Raises:
        ApiError: a field cannot be obeyed; an unknown one, where ``strict``.
    """
    extra: Mapping[str, Any] = fields.model_extra or {}
    own = list(type(fields).model_fields)
    for name, value in extra.items():
        neutral, way_out = REFUSED.get(name, ((), ""))
        if way_out and value is not None and value not in neutral:
            raise ApiError(
                f"`{name}` is {shown_value(value)}, which cannot be obeyed here. {way_out}",
                param=name,
                code="unsupported_parameter",
            )
    unknown = [name for name in extra if name not in ACCEPTED and name not in REFUSED]
    for name in own:
        inner = getattr(fields, name)
        if isinstance(inner, BaseModel):
            unknown += [f"{name}.{each}" for each in inner.model_extra or {} if each != "include_obfuscation"]
    if unknown and strict:
        raise unknown_field(unknown[0], [*own, *ACCEPTED])
    return unknown


def unknown_field(name: str, known: Iterable[str]) -> ApiError:
    """Return the error of a field that nobody knows."""
    near = difflib.get_close_matches(name, list(known), n=1)
    guess = f" Did you mean `{near[0]}`?" if near else " Leave it out."
    return ApiError(
        f"`{name[:100]}` is no field of this route.{guess}", param=name[:100], code="unknown_field"
    )


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """Return the header that names ignored fields, and log each the first time; no header for none."""
    # A name comes from outside: in a header and in a log only plain characters of it may stand.
    plain = list(dict.fromkeys(re.sub(r"[^A-Za-z0-9_.\-\[\]]", "?", name)[:64] or "?" for name in names))
    for name in plain:
        if name not in _logged and len(_logged) < MAX_REMEMBERED:
            _logged.add(name)
            LOGGER.warning("Requests hold the field %s, which is not known and ignored.", json.dumps(name))
    return {IGNORED_HEADER: ", ".join(plain[:20])} if plain else {}
