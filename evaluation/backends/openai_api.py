"""A server with OpenAI's interface behind an evaluation: turns to chat/completions, text to completions."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from evaluation.backend import Drawing, Limits, ModelIdentity
from evaluation.backends.endpoint import EndpointSettings
from evaluation.backends.event_loop import event_loop
from evaluation.backends.http_json import JsonClient, Patience
from evaluation.backends.http_replies import NotServedError, RefusedError
from evaluation.backends.openai_replies import ServedModel, read_completion, read_models, read_scores
from evaluation.sample import ChoiceScores, Completion, Failure, Prompt
from glmtune.errors import ConfigError, GlmtuneError
from glmtune.http_client.server_address import read_address, shown

Replied = TypeVar("Replied")

MOST_STOP_STRINGS = 4
"""OpenAI's limit; further ones are looked for here, in what comes back."""
ENDING_SECONDS = 5.0
"""How long answers under way are waited for when an error ends the run: they are paid for already."""
BYTES_PER_TOKEN = 2.5
"""A cautious guess for the length of a prompt before the server has counted it; prose has over 4."""


class OpenAIBackend:
    """Answers prompts through a server.

    The server adds template and special tokens. What it does not tell (weights, quantization) is empty or
    ``unknown`` in the identity, which holds instead where it is and what it says of the model. A question
    that it refuses is a `Failure`, never scored; too many of them, or a refusal that would meet every
    question, end the run.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        """Ask the server for its models.

        Raises:
            ConfigError: the server lists other models, or does not tell how long a context may be.
            GlmtuneError: the server cannot be reached.
        """
        self._settings = settings
        self._address = read_address(
            settings.base_url, api_key_env=settings.api_key_env, key_setting="endpoint.api_key_env"
        )
        self._num_failed = 0
        self.notes: tuple[str, ...] = ()
        models, date = self._listed()
        listed = {model.id: model for model in models}
        self._model = settings.model or next(iter(listed), "")
        if self._model not in listed:
            raise ConfigError(
                f"`endpoint.model` is `{shown(self._model)}`, but {self._address.shown} serves"
                f" {self._clean(', '.join(listed)) or 'no model'}. Name one of these."
            )
        served = listed[self._model]
        told = settings.max_context_tokens or served.max_model_len
        if not told or told < 1:
            raise ConfigError(
                f"{self._address.shown} does not say how long the context of `{shown(self._model)}` is. Set"
                " `endpoint.max_context_tokens`."
            )
        self._max_context_tokens = int(told)
        name = settings.server_name
        place = {"url": self._address.shown} if name is None else {"name": name}
        self._server = place | served.told(date, self._clean)

    def _listed(self) -> tuple[list[ServedModel], str | None]:
        """Ask for the list of models, which some servers do not have.

        Settings that say all that it is needed for take its place; `notes` tells what nobody could check.
        """
        model, context = self._settings.model, self._settings.max_context_tokens
        try:
            models, date = self._models()
            why = f"{self._address.shown}/models lists no model."
        except NotServedError as error:
            if not (model and context):
                raise GlmtuneError(
                    f"{error} A server without a list of models needs `endpoint.model` and"
                    " `endpoint.max_context_tokens`."
                ) from None
            models, date, why = [], None, str(error)
        if not models and model and context:
            self.notes = (
                f"{why} Not checked: whether `{shown(model)}` is served, which weights it has, and whether"
                f" its context holds {context:,} tokens; `endpoint.model` and `endpoint.max_context_tokens`"
                " are taken as they are.",
            )
            models = [ServedModel(id=model)]
        return models, date

    def without_secrets(self, text: str) -> str:
        """Return a text with the secrets of address and key made unreadable."""
        return self._address.without_secrets(text)

    def _clean(self, text: str) -> str:
        return shown(self._address.without_secrets(text))

    def _models(self) -> tuple[list[ServedModel], str | None]:
        with event_loop() as run:
            client = run(self._connect())
            try:
                models = run(
                    client.get("models", lambda answer: read_models(answer, where=self._address.shown))
                )
                return models, client.date
            finally:
                run(client.close())

    async def _connect(self) -> JsonClient:
        chosen = self._settings
        patience = Patience(chosen.timeout_seconds, chosen.max_retries, chosen.first_wait_seconds)
        return JsonClient(self._address, patience, connections=chosen.concurrency)

    @property
    def identity(self) -> ModelIdentity:
        """The model as the server names it; what it does not tell is empty or ``unknown``."""
        return ModelIdentity(
            name=self._address.without_secrets(self._model),
            weights_hash="",
            family="",
            dtype="",
            quantization="unknown",
            adapter="unknown",
            is_chat=self._settings.is_chat,
            engine="openai",
            server=self._server,
        )

    @property
    def max_context_tokens(self) -> int:
        """Prompt and completion together may be so long."""
        return self._max_context_tokens

    def count_tokens(self, prompt: Prompt) -> int:
        """Estimate the length of a prompt from its bytes; the true one comes back with the completion."""
        # Too long an estimate costs an exemplar of a long prompt, too short a one a refused question.
        texts = [prompt.text] if prompt.text is not None else [turn.content for turn in prompt.turns]
        return math.ceil(
            sum(len(text.encode("utf-8", "backslashreplace")) for text in texts) / BYTES_PER_TOKEN
        ) + 8 * len(texts)

    def generate(
        self, prompts: Sequence[Prompt], limits: Limits
    ) -> Iterator[tuple[int, Completion | Failure]]:
        """Complete prompts; see `evaluation.backend.Backend`. Whether a seed counts is the server's choice.

        Yields:
            Place of the prompt and its completion or why there is none, as they finish.

        Raises:
            GlmtuneError: the server would refuse every question, is out of reach, or failed at too many.
        """

        def complete(client: JsonClient, prompt: Prompt) -> Coroutine[Any, Any, Completion]:
            path, body = self._body(prompt, limits.max_new_tokens)
            if limits.drawing is not None:
                body |= _drawn(limits.drawing, prompt.seed)
            if limits.stop:
                body["stop"] = list(limits.stop[:MOST_STOP_STRINGS])
            return client.post(path, body, lambda answer: read_completion(answer, limits.stop))

        return self._each(prompts, complete)

    def score_choices(
        self, prompts: Sequence[Prompt], choices: Sequence[str]
    ) -> Iterator[tuple[int, ChoiceScores | Failure]]:
        """Return how probable each choice is as the next token; see `evaluation.backend.Backend`.

        Servers give the likeliest tokens only: a choice that is not among them gets `UNLISTED_LOGPROB`.

        Yields:
            Place of the prompt and its scores or why there are none, as they finish.

        Raises:
            GlmtuneError: the server would refuse every question, is out of reach, or failed at too many.
        """

        def score(client: JsonClient, prompt: Prompt) -> Coroutine[Any, Any, ChoiceScores]:
            path, body = self._body(prompt, 1)
            if path == "completions":
                body["logprobs"] = self._settings.top_logprobs
            else:
                body |= {"logprobs": True, "top_logprobs": self._settings.top_logprobs}
            is_chat = path != "completions"
            return client.post(path, body, lambda answer: read_scores(answer, choices, is_chat=is_chat))

        return self._each(prompts, score)

    def _body(self, prompt: Prompt, max_tokens: int) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"model": self._model, "temperature": 0, "max_tokens": max_tokens}
        if prompt.text is not None:
            return "completions", body | {"prompt": prompt.text}
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt.turns]
        return "chat/completions", body | {"messages": turns}

    def _each(
        self,
        prompts: Sequence[Prompt],
        ask: Callable[[JsonClient, Prompt], Coroutine[Any, Any, Replied]],
    ) -> Iterator[tuple[int, Replied | Failure]]:
        """Ask several questions at once; nothing is sent but while the next answer is awaited here."""
        waiting = iter(enumerate(prompts))
        running: dict[asyncio.Task[Replied], int] = {}
        with event_loop() as run:
            client = run(self._connect())

            async def next_done() -> set[asyncio.Task[Replied]]:
                while len(running) < self._settings.concurrency:
                    place, prompt = next(waiting, (-1, None))
                    if prompt is None:
                        break
                    running[asyncio.create_task(ask(client, prompt))] = place
                return (
                    (await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))[0]
                    if running
                    else set()
                )

            try:
                while done := run(next_done()):
                    yield from self._results(done, running)
                    if problem := self._reason_to_end(done):
                        client.end()
                        # What still answers is kept; what fails now would only repeat the problem.
                        late = run(_wait(running, ENDING_SECONDS))
                        yield from self._results({task for task in late if not task.exception()}, running)
                        raise problem
            finally:
                run(_cancel(client, running))

    def _results(
        self, done: set[asyncio.Task[Replied]], running: dict[asyncio.Task[Replied], int]
    ) -> Iterator[tuple[int, Replied | Failure]]:
        """Give out what has finished, save what ends the run; answers first, so that they are kept."""
        for task in sorted(done, key=lambda task: task.exception() is not None):
            place, error = running.pop(task), task.exception()
            if error is None:
                yield place, task.result()
            elif isinstance(error, RefusedError):
                self._num_failed += 1
                yield place, Failure(str(error))

    def _reason_to_end(self, done: set[asyncio.Task[Replied]]) -> BaseException | None:
        """Return what meets every question, or the error of too many that failed by themselves."""
        errors = [error for task in done if (error := task.exception()) is not None]
        general = [error for error in errors if not isinstance(error, RefusedError)]
        if general:
            return general[0]
        allowed = self._settings.max_failed_questions
        if not errors or self._num_failed <= allowed:
            return None
        return GlmtuneError(
            f"{self._num_failed} questions failed, but `endpoint.max_failed_questions` allows {allowed}. The"
            f" last one: {errors[0]} Mend the cause or allow more, then run the same command again: answers"
            " so far are kept, and only what has none is asked."
        )


def _drawn(drawing: Drawing, seed: int | None) -> dict[str, Any]:
    """Return the fields that let a server draw; those that say nothing are left out, as not all know them."""
    body: dict[str, Any] = {"temperature": drawing.temperature, "seed": seed}
    if drawing.top_p < 1:
        body["top_p"] = drawing.top_p
    if drawing.top_k:
        body["top_k"] = drawing.top_k
    return body


async def _wait(running: dict[asyncio.Task[Replied], int], seconds: float) -> set[asyncio.Task[Replied]]:
    """Return the tasks that end in time."""
    return (await asyncio.wait(running, timeout=seconds))[0] if running else set()


async def _cancel(client: JsonClient, running: dict[asyncio.Task[Replied], int]) -> None:
    """Break off what is under way and close the connections."""
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await client.close()
