"""A server with OpenAI's interface behind an evaluation: turns to chat/completions, text to completions."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from evaluation.backend import Limits, ModelIdentity
from evaluation.backends.http_json import JsonClient
from evaluation.sample import ChoiceScores, Completion, Prompt
from glmtune.errors import ConfigError, GlmtuneError
from glmtune.settings import check_range, setting

Replied = TypeVar("Replied")

MOST_STOP_STRINGS = 4
"""OpenAI's limit; further ones are looked for here, in what comes back."""
UNLISTED_LOGPROB = -100.0
"""What a choice gets that is not among the likeliest, as in the original code of MMLU (hendrycks/test)."""
BYTES_PER_TOKEN = 2.5
"""A cautious guess for the length of a prompt before the server has counted it; prose has over 4."""


@dataclass(frozen=True)
class EndpointSettings:
    """A server with OpenAI's interface."""

    base_url: str = setting("http://localhost:8000/v1", "address up to and with /v1")
    model: str = setting("", "model name as the server knows it; empty: the first it lists")
    is_chat: bool = setting(True, "questions as conversations (chat/completions) or as text (completions)")
    max_context_tokens: int | None = setting(
        None, "longest prompt and completion; default: what the server says (max_model_len)"
    )
    api_key_env: str = setting("OPENAI_API_KEY", "environment variable that holds the key, if one is needed")
    top_logprobs: int = setting(20, "likeliest next tokens asked for to score choices; OpenAI allows text 5")
    concurrency: int = setting(16, "requests under way at once")
    timeout_seconds: float = setting(600.0, "per request")
    max_retries: int = setting(8, "further attempts while the server is busy or out of reach")
    first_wait_seconds: float = setting(1.0, "pause before the first further attempt; it doubles each time")

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a number is out of range, or the address is none.
        """
        check_range("endpoint.concurrency", self.concurrency, low=1)
        check_range("endpoint.top_logprobs", self.top_logprobs, low=1)
        check_range("endpoint.max_retries", self.max_retries, low=0)
        check_range("endpoint.timeout_seconds", self.timeout_seconds, low=0.001)
        check_range("endpoint.first_wait_seconds", self.first_wait_seconds, low=0)
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"`endpoint.base_url` is `{self.base_url}`, but it must start with http:// or https://."
                " Give the address of the server, such as http://localhost:8000/v1."
            )


class OpenAIBackend:
    """Answers prompts through a server.

    The server adds template and special tokens. What it does not tell (weights, quantization) is empty or
    ``unknown`` in the identity. A request that it refuses stops the run; it is never scored.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        """Ask the server for its models.

        Raises:
            ConfigError: the server lists no such model, or does not tell how long a context may be.
            GlmtuneError: the server cannot be reached.
        """
        self._settings = settings
        self._client = JsonClient(
            settings.base_url,
            api_key=os.environ.get(settings.api_key_env, ""),
            timeout_seconds=settings.timeout_seconds,
            max_retries=settings.max_retries,
            first_wait_seconds=settings.first_wait_seconds,
        )
        listed = {str(model["id"]): model for model in self._client.get("models").get("data", [])}
        self._model = settings.model or next(iter(listed), "")
        if self._model not in listed:
            raise ConfigError(
                f"`endpoint.model` is `{self._model}`, but {settings.base_url} serves"
                f" {', '.join(listed) or 'no model'}. Name one of these."
            )
        told = settings.max_context_tokens or listed[self._model].get("max_model_len")
        if not told:
            raise ConfigError(
                f"{settings.base_url} does not say how long the context of `{self._model}` is. Set"
                " `endpoint.max_context_tokens`."
            )
        self._max_context_tokens = int(told)

    @property
    def identity(self) -> ModelIdentity:
        """The model as the server names it; what it does not tell is empty or ``unknown``."""
        return ModelIdentity(
            name=self._model,
            weights_hash="",
            family="",
            dtype="",
            quantization="unknown",
            adapter="unknown",
            is_chat=self._settings.is_chat,
            engine="openai",
        )

    @property
    def max_context_tokens(self) -> int:
        """Prompt and completion together may be so long."""
        return self._max_context_tokens

    def count_tokens(self, prompt: Prompt) -> int:
        """Estimate the length of a prompt from its bytes; the true one comes back with the completion."""
        # Too long an estimate costs an exemplar of a long prompt, too short a one a refused request and with
        # it the run.
        texts = [prompt.text] if prompt.text is not None else [turn.content for turn in prompt.turns]
        return math.ceil(sum(len(text.encode()) for text in texts) / BYTES_PER_TOKEN) + 8 * len(texts)

    def generate(self, prompts: Sequence[Prompt], limits: Limits) -> Iterator[tuple[int, Completion]]:
        """Complete prompts greedily; see `evaluation.backend.Backend`.

        Yields:
            Place of the prompt and its completion, as they finish.

        Raises:
            GlmtuneError: the server refused a request, withheld an answer, or stayed out of reach.
        """

        def complete(prompt: Prompt) -> Completion:
            path, body = self._body(prompt, limits.max_new_tokens)
            if limits.stop:
                body["stop"] = list(limits.stop[:MOST_STOP_STRINGS])
            return read_completion(self._client.post(path, body), limits.stop)

        return self._each(prompts, complete)

    def score_choices(
        self, prompts: Sequence[Prompt], choices: Sequence[str]
    ) -> Iterator[tuple[int, ChoiceScores]]:
        """Return how probable each choice is as the next token; see `evaluation.backend.Backend`.

        Servers give the likeliest tokens only: a choice that is not among them gets `UNLISTED_LOGPROB`.

        Yields:
            Place of the prompt and its scores, as they finish.

        Raises:
            GlmtuneError: the server gives no log-probabilities, or lists none of the choices.
        """

        def score(prompt: Prompt) -> ChoiceScores:
            path, body = self._body(prompt, 1)
            if path == "completions":
                body["logprobs"] = self._settings.top_logprobs
            else:
                body |= {"logprobs": True, "top_logprobs": self._settings.top_logprobs}
            return read_scores(self._client.post(path, body), choices)

        return self._each(prompts, score)

    def _body(self, prompt: Prompt, max_tokens: int) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"model": self._model, "temperature": 0, "max_tokens": max_tokens}
        if prompt.text is not None:
            return "completions", body | {"prompt": prompt.text}
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt.turns]
        return "chat/completions", body | {"messages": turns}

    def _each(
        self, prompts: Sequence[Prompt], answer: Callable[[Prompt], Replied]
    ) -> Iterator[tuple[int, Replied]]:
        """Answer prompts in threads; after a failure nothing more is sent."""
        waiting = iter(enumerate(prompts))
        running: dict[Future[Replied], int] = {}
        pool = ThreadPoolExecutor(self._settings.concurrency)
        try:
            while True:
                while len(running) < self._settings.concurrency:
                    place, prompt = next(waiting, (-1, None))
                    if prompt is None:
                        break
                    running[pool.submit(answer, prompt)] = place
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                # Answers that arrived together with a failure are given out first, so that they are kept.
                failed = [future for future in done if future.exception() is not None]
                for future in done - set(failed):
                    yield running.pop(future), future.result()
                for future in failed:
                    future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def read_completion(answer: Mapping[str, Any], stop: Sequence[str]) -> Completion:
    """Turn a server's answer into a completion.

    Args:
        answer: of either interface.
        stop: strings that end the text; the server has cut it at the first few of them.

    Raises:
        GlmtuneError: the text was withheld (refusal, content filter), or is missing.
    """
    choice = _choice(answer)
    message = choice.get("message")
    text = choice.get("text") if message is None else message.get("content")
    reason = choice.get("finish_reason")
    refusal = None if message is None else message.get("refusal")
    if refusal or reason == "content_filter" or text is None:
        raise GlmtuneError(
            f"The server withheld an answer (finish_reason {reason!r}, refusal {str(refusal)[:80]!r}), and a"
            " refused question must not be scored as wrong. Use a server without a filter, or leave the"
            " question out."
        )
    # The server was given MOST_STOP_STRINGS of them at most.
    place = min((found for part in stop if (found := text.find(part)) >= 0), default=None)
    # vLLM names in `stop_reason` the string that ended the text; OpenAI's `finish_reason` is "stop" for the
    # end token too.
    if place is not None or isinstance(choice.get("stop_reason"), str):
        reason = "stop"
    else:
        reason = "length" if reason == "length" else "eos"
    usage = answer.get("usage") or {}
    return Completion(
        text[:place], reason, int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    )


def read_scores(answer: Mapping[str, Any], choices: Sequence[str]) -> ChoiceScores:
    """Find the choices among the likeliest next tokens of a server's answer.

    A token counts for a choice if its text is the same; else if only the blank in front differs, which
    servers of sentencepiece models drop.

    Raises:
        GlmtuneError: there are no log-probabilities, or no choice is among the tokens.
    """
    logprobs = _choice(answer).get("logprobs") or {}
    listed: dict[str, float] = {}
    if logprobs.get("content"):
        listed = {item["token"]: item["logprob"] for item in logprobs["content"][0].get("top_logprobs") or []}
    elif logprobs.get("top_logprobs"):
        listed = dict(logprobs["top_logprobs"][0])
    if not listed:
        raise GlmtuneError(
            "The server gives no log-probabilities of the next token, but this protocol compares those of"
            f" {', '.join(map(repr, choices))}. Use a server that gives them (vLLM does), or a protocol that"
            " generates, such as `protocol=few_shot_cot`."
        )
    # Servers of sentencepiece models show a blank as U+2581.
    named = {token.replace("▁", " "): value for token, value in listed.items()}
    bare: dict[str, float] = {}
    for token, value in named.items():
        bare[token.strip()] = max(value, bare.get(token.strip(), -math.inf))
    found = [named.get(choice, bare.get(choice.strip())) for choice in choices]
    if all(value is None for value in found):
        raise GlmtuneError(
            f"None of the choices {', '.join(map(repr, choices))} is among the {len(listed)} likeliest next"
            f" tokens that the server lists: {json.dumps(list(listed), ensure_ascii=False)}. Use a protocol"
            " that generates, or the model itself (`backend=glmtune`)."
        )
    usage = answer.get("usage") or {}
    return ChoiceScores(
        tuple(UNLISTED_LOGPROB if value is None else float(value) for value in found),
        int(usage.get("prompt_tokens") or 0),
    )


def _choice(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return answer["choices"][0]
    except (KeyError, IndexError, TypeError):
        raise GlmtuneError(
            f"The server's answer has no `choices`: {json.dumps(answer)[:200]}. Check that"
            " `endpoint.base_url` is an OpenAI-compatible one."
        ) from None
