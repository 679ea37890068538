"""What comes back from a server with OpenAI's interface, checked and turned into our records.

Nothing a server sends is taken on trust: what has not the form it should have is a `RefusedError` of that
one question, which is never scored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, TypeGuard

from pydantic import BaseModel, ValidationError

from evaluation.backends.http_replies import MalformedError, NotServedError, RefusedError
from evaluation.sample import ChoiceScores, Completion
from glmtune.http_client.server_address import shown

UNLISTED_LOGPROB = -100.0
"""What a choice gets that is not among the likeliest, as in the original code of MMLU (hendrycks/test)."""
MOST_COUNTED = 2**53
MOST_TOLD = 20
TOLD = ("root", "parent", "owned_by", "meta")
"""What servers say of a model that stays the same while the model does.

vLLM and SGLang name its folder (``root``), an adapter's base (``parent``) and themselves; llama.cpp gives
sizes (``meta``), which tell quantized variants apart. Not ``permission``: vLLM makes it for every request.
"""
CLOCK_SECONDS = 10
"""A ``created`` so near to the server's clock is the time of the request (vLLM, llama.cpp)."""


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Token(BaseModel):
    token: str
    logprob: float


class _Position(BaseModel):
    top_logprobs: list[_Token] | None = None


class _Logprobs(BaseModel):
    content: list[_Position] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(BaseModel):
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: Any = None
    logprobs: _Logprobs | None = None


class _Answer(BaseModel):
    choices: list[_Choice]
    usage: Any = None


class ServedModel(BaseModel):
    """A model as a server lists it.

    Attributes:
        id: its name there.
        max_model_len: longest prompt and completion; None if the server does not say.
        created: seconds since 1970; of the model, or of the request.
    """

    id: str
    max_model_len: int | None = None
    created: Any = None
    root: Any = None
    parent: Any = None
    owned_by: Any = None
    meta: Any = None

    def told(self, date: str | None, clean: Callable[[str], str] = shown) -> dict[str, Any]:
        """Return what the server says of the model that does not change by itself.

        Args:
            date: of the answer, by the server's clock; without it, `created` may be the time of the request.
            clean: makes a text fit to be kept.
        """
        values: dict[str, Any] = {name: _plain(getattr(self, name), clean) for name in TOLD}
        if _is_count(self.created) and not _is_now(self.created, date):
            values["created"] = self.created
        return {name: value for name, value in values.items() if value not in (None, "", {})}


def read_models(answer: object, *, where: str) -> list[ServedModel]:
    """Read the list of models; entries that are none are passed over, as long as there is one that is.

    Args:
        answer: to ``/models``.
        where: address of the server, for the message.

    Raises:
        NotServedError: it is no such list.
    """
    entries = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        raise NotServedError(
            f"{where}/models gives no list of models. Check that `endpoint.base_url` is the address of an"
            " OpenAI-compatible server, up to and with /v1."
        )
    found: list[ServedModel] = []
    problem = ""
    for entry in entries:
        try:
            found.append(ServedModel.model_validate(entry))
        except ValidationError as error:
            problem = problem or _first_problem(error)
    if problem and not found:
        raise NotServedError(f"{where}/models lists no model ({problem}). Check `endpoint.base_url`.")
    return found


def read_completion(answer: Mapping[str, Any], stop: Sequence[str]) -> Completion:
    """Turn a server's answer into a completion.

    Args:
        answer: of either interface.
        stop: strings that end the text; the server has cut it at the first few of them.

    Raises:
        RefusedError: the text was withheld (refusal, content filter), or is missing.
        MalformedError: it has another form.
    """
    whole = _checked(answer)
    choice = whole.choices[0]
    message, reason = choice.message, choice.finish_reason
    text = choice.text if message is None else message.content
    refusal = None if message is None else message.refusal
    if text is None and reason == "length" and not refusal:
        text = ""  # all tokens went into reasoning, which is not part of the answer: cut before it began
    if refusal or reason == "content_filter" or text is None:
        raise RefusedError(
            f"The server withheld an answer (finish_reason {shown(str(reason))!r}, refusal"
            f" {shown(str(refusal))[:80]!r}), and a refused question must not be scored as wrong. Use a"
            " server without a filter, or leave the question out."
        )
    # The server was given MOST_STOP_STRINGS of them at most.
    place = min((found for part in stop if (found := text.find(part)) >= 0), default=None)
    # vLLM names in `stop_reason` the string that ended the text; OpenAI's `finish_reason` is "stop" for the
    # end token too.
    if place is not None or isinstance(choice.stop_reason, str):
        reason = "stop"
    else:
        reason = "length" if reason == "length" else "eos"
    return Completion(
        text[:place], reason, _tokens(whole, "prompt_tokens"), _tokens(whole, "completion_tokens")
    )


def read_scores(answer: Mapping[str, Any], choices: Sequence[str], *, is_chat: bool = False) -> ChoiceScores:
    """Find the choices among the likeliest next tokens of a server's answer.

    A token counts for a choice if its text is the same; else if only the blank in front differs, which
    servers of sentencepiece models drop. At the start of a chat's answer both forms are the same text (a
    sentencepiece model was taught the one with the blank, the other is a rare accident): the likelier counts.

    Args:
        answer: as parsed from JSON.
        choices: texts of one token.
        is_chat: the token is the first of a chat's answer.

    Raises:
        RefusedError: there are no log-probabilities, or no choice is among the tokens.
        MalformedError: it has another form.
    """
    whole = _checked(answer)
    listed = _listed(whole.choices[0].logprobs)
    if not listed:
        raise RefusedError(
            "The server gives no log-probabilities of the next token, but this protocol compares those of"
            f" {', '.join(map(repr, choices))}. Use a server that gives them (vLLM does), or a protocol that"
            " generates, such as `protocol=few_shot_cot`."
        )
    # Servers of sentencepiece models show a blank as U+2581.
    named: dict[str, float] = {}
    bare: dict[str, float] = {}
    for token, value in listed:
        token = token.replace("▁", " ")
        named[token] = max(value, named.get(token, -math.inf))
        bare[token.strip()] = max(value, bare.get(token.strip(), -math.inf))
    if is_chat:
        named = bare
    found = [named.get(choice, bare.get(choice.strip())) for choice in choices]
    if all(value is None for value in found):
        tokens = json.dumps([token for token, _ in listed[:20]], ensure_ascii=False)
        raise RefusedError(
            f"None of the choices {', '.join(map(repr, choices))} is among the {len(listed)} likeliest next"
            f" tokens that the server lists: {shown(tokens)}. Use a protocol that generates, or the model"
            " itself (`backend=glmtune`)."
        )
    scores = tuple(UNLISTED_LOGPROB if value is None else value for value in found)
    return ChoiceScores(scores, _tokens(whole, "prompt_tokens"))


def _checked(answer: Mapping[str, Any]) -> _Answer:
    """Return an answer of the form it should have, with one choice at least."""
    try:
        checked = _Answer.model_validate(answer)
        if checked.choices:
            return checked
        problem = "`choices` is empty"
    except ValidationError as error:
        problem = _first_problem(error)
        if not (isinstance(answer, Mapping) and "choices" in answer):
            keys = ", ".join(map(str, list(answer)[:8])) if isinstance(answer, Mapping) else ""
            problem = f"it has no `choices`, but: {keys or type(answer).__name__}"
    raise MalformedError(
        f"its answer has another form than OpenAI's ({shown(problem)}); check that `endpoint.base_url` is"
        " that of a compatible server"
    )


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    return shown(f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}")


def _listed(logprobs: _Logprobs | None) -> list[tuple[str, float]]:
    """Return the likeliest next tokens of either interface; values that are no finite numbers are dropped."""
    found: list[tuple[str, float]] = []
    if logprobs is not None and logprobs.content:
        found = [(each.token, each.logprob) for each in logprobs.content[0].top_logprobs or []]
    elif logprobs is not None and logprobs.top_logprobs:
        found = list((logprobs.top_logprobs[0] or {}).items())
    return [(token, value) for token, value in found if math.isfinite(value)]


def _tokens(answer: _Answer, name: str) -> int:
    """Return a count of the answer; 0 where it is absent or none, as no score depends on it."""
    count = answer.usage.get(name) if isinstance(answer.usage, dict) else None
    return count if _is_count(count) else 0


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_COUNTED


def _is_now(created: int, date: str | None) -> bool:
    try:
        return abs(parsedate_to_datetime(date or "").timestamp() - created) < CLOCK_SECONDS
    except (ValueError, TypeError, OverflowError):
        return True


def _plain(value: Any, clean: Callable[[str], str]) -> Any:
    """Return a value of a size and form that an identity may hold; None for all others."""
    if isinstance(value, dict):
        flat = [
            (clean(key), _plain(inner, clean)) for key, inner in value.items() if not isinstance(inner, dict)
        ]
        return {key: inner for key, inner in flat[:MOST_TOLD] if inner is not None}
    if isinstance(value, str):
        return clean(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number and abs(value) < MOST_COUNTED else None
