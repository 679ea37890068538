"""A loaded GLM behind an evaluation: the only file of this package that touches glmtune's models."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.backend import Limits, ModelIdentity
from evaluation.compare.statistics.perplexity import WindowLoss
from evaluation.sample import ChoiceScores, Completion, Prompt
from glmtune.adapter import find_adapter, load_adapter
from glmtune.errors import DataError
from glmtune.inference.engine.engine import Engine
from glmtune.inference.perplexity import token_losses
from glmtune.inference.settings import EngineSettings
from glmtune.loading import load_tokenizer, load_tuned
from glmtune.messages import Message
from glmtune.models.architectures.unwrap import unwrapped
from glmtune.models.releases.families import Family
from glmtune.models.settings import ModelSettings
from glmtune.models.templates.renderer import TextTokenizer, template_for
from glmtune.quantization.kernels.dispatch import prepare_for_inference

ENCODED_PROMPTS = 16384
"""Prompts whose ids are remembered: a runner counts a prompt's tokens before it has it answered."""
SAMPLES_PER_TENSOR = 4096
_ADAPTER_NAME = re.compile(r"(^|\.)(lora_\w+|prefix_encoder)\.")


class PromptEncoder:
    """Turns prompts into the ids a GLM was trained on: the model's template and ``[gMASK] sop`` included.

    Attributes:
        family: the release.
        stop_ids: tokens that end a completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take a tokenizer of ours."""
        self._tokenizer = tokenizer
        self._ours = cast("TextTokenizer", tokenizer)
        self._template = template_for(self._ours)
        self.family = self._ours.family
        self.stop_ids = self._template.stop_ids(self._ours)
        self.ids = lru_cache(ENCODED_PROMPTS)(self._ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return generated ids as text, without special tokens, not stripped or cleaned."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def plain_ids(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of ``[gMASK] sop``, and those of a text that follows them."""
        return [*self._ours.prefix_ids, *self._ours.suffix_ids], self._ours.text_ids(text)

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Encode a prompt; ``ids`` remembers the latest ones.

        Raises:
            DataError: turns that the template cannot show, or special tokens that are not there exactly once.
        """
        if prompt.text is None:
            messages = [Message(turn.role, turn.content) for turn in prompt.turns]
            ids = self._template.encode_prompt(self._ours, messages)
        else:
            ids = [*self._ours.prefix_ids, *self._ours.text_ids(prompt.text), *self._ours.suffix_ids]
        check_marks(ids, [*self._ours.prefix_ids, *self._ours.suffix_ids])
        return tuple(ids)

    def choice_ids(self, prompt: Prompt, choices: Sequence[str]) -> tuple[tuple[int, ...], list[int]]:
        """Find the token of each choice after a prompt.

        Args:
            prompt: the question.
            choices: strings as they follow it.

        Returns:
            The ids that stand before every choice (the prompt's, and what all answers begin with), and the
            one id of each choice.

        Raises:
            DataError: a choice is no single token there, or two choices are the same one.
        """
        answered = [self._answered(prompt, choice) for choice in choices]
        context, lasts = answered[0][:-1], [ids[-1] for ids in answered]
        for choice, ids in zip(choices, answered, strict=True):
            if ids[:-1] != context:
                raise DataError(
                    f"The choice {choice!r} must be one token after the prompt, but after"
                    f" {_ending(prompt)!r} the tokens of the choices are {_differing(answered)}. Drop blanks"
                    " at the end of the prompt, or write the choice as the model would (` A` or `A`)."
                )
        if len(set(lasts)) < len(lasts):
            raise DataError(
                f"The choices {', '.join(map(repr, choices))} must differ in their token, but their ids after"
                f" the prompt are {lasts}. Give choices that the tokenizer tells apart."
            )
        return context, lasts

    def _answered(self, prompt: Prompt, choice: str) -> tuple[int, ...]:
        """Encode a prompt followed by a choice, without the end token."""
        if prompt.text is None:
            answer = self._template.encode_answer(self._ours, Message("assistant", choice))[:-1]
            return (*self.ids(prompt), *answer)
        if self._ours.suffix_ids:  # ChatGLM-6B: the answer stands behind [gMASK] sop
            return (*self.ids(prompt), *self._ours.text_ids(choice))
        return (*self._ours.prefix_ids, *self._ours.text_ids(prompt.text + choice))


class GlmBackend:
    """Answers prompts with a model in this process: any GLM, tuned or quantized, on CPU or one GPU.

    Where several processes evaluate, each builds its own and is given its own share of the prompts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        is_chat: bool | None = None,
        settings: EngineSettings | None = None,
        activations: str | None = None,
    ) -> None:
        """Take a model as `glmtune.load_model` returns it, with what was attached to it since.

        Args:
            model: switched to evaluation mode; its weights must not change while the backend lives.
            tokenizer: from `glmtune.load_tokenizer`.
            name: how the user named the model; None takes ``model.source``.
            is_chat: whether prompts are conversations; None decides by the name (`is_chat_model`).
            settings: how much is done at once.
            activations: what the inputs of quantized layers are rounded to, if they are.
        """
        self._model = model
        self._encoder = PromptEncoder(tokenizer)
        self._engine = Engine(model, settings)
        found = identify(model, self._encoder.family, name=name, is_chat=is_chat)
        kept = self._engine.settings.kv_cache
        engine = found.engine if kept == "plain" else f"{found.engine}, {kept} kv_cache"
        quantization = (
            found.quantization if activations is None else f"{found.quantization}-a{activations[3:]}"
        )
        self._identity = dataclasses.replace(found, engine=engine, quantization=quantization)

    @property
    def identity(self) -> ModelIdentity:
        """Which model this is, what is attached to it and how it computes."""
        return self._identity

    @property
    def max_context_tokens(self) -> int:
        """Prompt and completion together may be so long."""
        return self._engine.max_context_tokens

    def count_tokens(self, prompt: Prompt) -> int:
        """Return the length of a prompt in tokens, ``[gMASK] sop`` and template included."""
        return len(self._encoder.ids(prompt))

    def generate(self, prompts: Sequence[Prompt], limits: Limits) -> Iterator[tuple[int, Completion]]:
        """Complete prompts greedily; see `evaluation.backend.Backend`.

        Texts are as decoded: without special tokens, not stripped or cleaned.

        Yields:
            Place of the prompt and its completion, as they finish.

        Raises:
            ConfigError: a prompt with its completion does not fit the model's context.
            DataError: turns that the model's template cannot show.
            GlmtuneError: memory does not suffice even for one prompt.
        """
        texts = self._engine.generate(
            [self._encoder.ids(prompt) for prompt in prompts],
            max_new_tokens=limits.max_new_tokens,
            stop_ids=self._encoder.stop_ids,
            decode=self._encoder.decode,
            stop=limits.stop,
        )
        for made in texts:
            yield (
                made.index,
                Completion(made.text, made.stop_reason, made.num_prompt_tokens, made.num_new_tokens),
            )

    def score_choices(
        self, prompts: Sequence[Prompt], choices: Sequence[str]
    ) -> Iterator[tuple[int, ChoiceScores]]:
        """Return how probable each choice is as the next token; see `evaluation.backend.Backend`.

        The answer to a chat is encoded as the model's template encodes answers. Ids with which all answers
        begin (the line break after ChatGLM3's role token) count as part of the prompt.

        Yields:
            Place of the prompt and its scores, as they finish.

        Raises:
            ConfigError: a prompt does not fit the model's context.
            DataError: a choice is no single token after a prompt, or two choices are the same one.
            GlmtuneError: memory does not suffice even for one prompt.
        """
        asked = [self._encoder.choice_ids(prompt, choices) for prompt in prompts]
        scores = self._engine.score_next([context for context, _ in asked], [ids for _, ids in asked])
        for place, logprobs in scores:
            yield place, ChoiceScores(logprobs, self.count_tokens(prompts[place]))

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights as they are held: codes, scales, and what is not quantized."""
        return sum(
            tensor.numel() * tensor.element_size() for tensor in unwrapped(self._model).state_dict().values()
        )

    def text_losses(self, text: str, window_tokens: int) -> list[WindowLoss]:
        """Read a plain text window by window; see `glmtune.inference.perplexity`.

        Args:
            text: as a base model would continue it.
            window_tokens: tokens read at once.

        Raises:
            ConfigError: a window does not fit the model's context.
            DataError: the text is empty.
        """
        windows = token_losses(self._model, self._encoder.plain_ids, text, window_tokens=window_tokens)
        return [WindowLoss(len(losses_S), float(losses_S.double().sum())) for losses_S in windows]


def load_backend(
    model: ModelSettings,
    *,
    prefix_path: str | None = None,
    adapter_path: str | None = None,
    is_chat: bool | None = None,
    settings: EngineSettings | None = None,
    num_threads: int | None = None,
) -> GlmBackend:
    """Load a model with what was tuned, ready to answer.

    Args:
        model: which one, and how.
        prefix_path: tuned prefix, if any.
        adapter_path: LoRA adapter, if any.
        is_chat: see `GlmBackend`.
        settings: see `GlmBackend`.
        num_threads: threads of the CPU; None leaves PyTorch's choice.

    Raises:
        GlmtuneError: see `glmtune.loading.load_model`.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    tokenizer = load_tokenizer(model.source, family=model.family)
    loaded: Any = load_tuned(
        model.source,
        dtype=model.dtype,
        device=_device(model.device),
        family=model.family,
        quantization=model.method,
        prefix=prefix_path,
    )
    if adapter_path is not None:
        loaded = load_adapter(find_adapter(adapter_path), loaded)
    activations = model.quantization_activations
    options: dict[str, Any] = {"is_chat": is_chat, "settings": settings, "activations": activations}
    backend = GlmBackend(loaded, tokenizer, name=model.source, **options)
    prepare_for_inference(loaded, activations=activations)  # after the hashes, which read the codes as stored
    return backend


def _device(given: str) -> str:
    """Return the device of this process: with torchrun, each takes the GPU of its local rank."""
    if given != "auto" or not torch.cuda.is_available():
        return given
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def check_marks(token_ids: Sequence[int], marks: Sequence[int]) -> None:
    """Raise DataError unless each of the marks (``[gMASK] sop``) is in a prompt exactly once."""
    counts = [list(token_ids).count(mark) for mark in marks]
    if any(count != 1 for count in counts):
        raise DataError(
            f"A prompt must hold [gMASK] and sop (ids {list(marks)}) exactly once, but this one holds them"
            f" {counts} times. Give the text without special tokens; the backend adds them."
        )


def is_chat_model(name: str, family: Family) -> bool:
    """Decide by its name whether a model was tuned for conversations.

    >>> is_chat_model("chatglm3-6b", Family.CHATGLM3), is_chat_model("chatglm3-6b-base", Family.CHATGLM3)
    (True, False)
    >>> is_chat_model("glm-4-9b", Family.GLM4), is_chat_model("glm-4-9b-chat-1m", Family.GLM4)
    (False, True)
    """
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
    if family is Family.CODEGEEX2 or re.search(r"(^|[-_])base($|[-_])", last):
        return False
    return family is not Family.GLM4 or "chat" in last


def identify(
    model: PreTrainedModel, family: Family, *, name: str | None = None, is_chat: bool | None = None
) -> ModelIdentity:
    """Describe a loaded model: its weights, what is attached to it, and how it computes.

    The hashes cover name, shape, type and some 4,096 spread values of every tensor.
    """
    base = unwrapped(model)
    chosen = name or str(getattr(base, "source", "")) or family.value
    weights: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    for key, tensor in base.state_dict().items():
        (adapter if _ADAPTER_NAME.search(key) else weights)[key.replace(".base_layer.", ".")] = tensor
    embedding = base.get_input_embeddings().weight
    return ModelIdentity(
        name=chosen,
        weights_hash=hash_tensors(weights),
        family=family.value,
        dtype=str(embedding.dtype if embedding.is_floating_point() else base.dtype).removeprefix("torch."),
        quantization=_quantization(base),
        adapter=hash_tensors(adapter) if adapter else "none",
        is_chat=is_chat_model(chosen, family) if is_chat is None else is_chat,
        engine="glmtune",
    )


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits that change with any tensor's name, shape, type or (sampled) values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES_PER_TENSOR) | 1  # odd: no column is met again and again
        sample = flat[::step].contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _quantization(base: Any) -> str:
    """Return the method the model names: our own, or one of transformers'."""
    if getattr(base, "quantization", None):
        return str(base.quantization)
    settings = getattr(base.config, "quantization_config", None)
    if settings is None:
        return "none"
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method))


def _ending(prompt: Prompt) -> str:
    return (prompt.text if prompt.text is not None else prompt.turns[-1].content)[-20:]


def _differing(answered: Sequence[tuple[int, ...]]) -> str:
    """Show the last ids of each answered prompt, from the first place on at which any two differ."""
    start = 0
    while all(len(ids) > start and ids[start] == answered[0][start] for ids in answered):
        start += 1
    return ", ".join(str(list(ids[start:])) for ids in answered)
