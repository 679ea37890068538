"""vLLM behind an evaluation: its engine on a GPU, our tokenizer and prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from evaluation.backend import Drawing, Limits, ModelIdentity
from evaluation.backends.prompt_encoder import PromptEncoder, is_chat_model
from evaluation.sample import ChoiceScores, Completion, Prompt
from glmtune.errors import MissingExtraError
from glmtune.inference.requests.text_stream import StopSearch

ROUND_TOKENS = 128
"""With stop strings: tokens generated between two looks at the text; the cache makes going on cheap."""
TOP_LOGPROBS = 20
"""Likeliest next tokens asked for; vLLM's own limit."""
WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})


class VllmBackend:
    """Answers prompts with vLLM; ids go in and come out, so prompts are exactly those of `GlmBackend`."""

    def __init__(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        is_chat: bool | None = None,
        **options: Any,
    ) -> None:
        """Start the engine.

        Args:
            source: a folder or hub id that vLLM can serve, such as one written by ``glmtune export``.
            tokenizer: from `glmtune.load_tokenizer`.
            name: how the user named the model; None takes ``source``.
            is_chat: whether prompts are conversations; None decides by the name.
            **options: passed to ``vllm.LLM``, such as ``dtype`` or ``tensor_parallel_size``.

        Raises:
            MissingExtraError: vLLM is not installed.
        """
        try:
            import vllm  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise MissingExtraError("`backend=vllm`", extra="vllm") from None
        self._make_parameters: Any = vllm.SamplingParams
        self._encoder = PromptEncoder(tokenizer)
        self._engine: Any = vllm.LLM(
            model=source, skip_tokenizer_init=True, enable_prefix_caching=True, **options
        )
        config = self._engine.llm_engine.model_config
        weights_hash, config_hash = hash_folder(Path(source), self._encoder.vocabulary_hash)
        self._max_context_tokens = int(config.max_model_len)
        chosen = name or source
        family = self._encoder.family
        self._identity = ModelIdentity(
            name=chosen,
            weights_hash=weights_hash,
            family=family.value,
            dtype=str(config.dtype).removeprefix("torch."),
            quantization=str(getattr(config, "quantization", None) or "none"),
            adapter="none",
            is_chat=(
                is_chat_model(chosen, family, has_template=self._encoder.has_chat_template)
                if is_chat is None
                else is_chat
            ),
            engine="vllm",
            config_hash=config_hash,
        )

    @property
    def identity(self) -> ModelIdentity:
        """Which model this is."""
        return self._identity

    @property
    def max_context_tokens(self) -> int:
        """Prompt and completion together may be so long."""
        return self._max_context_tokens

    def count_tokens(self, prompt: Prompt) -> int:
        """Return the length of a prompt in tokens, ``[gMASK] sop`` and template included."""
        return len(self._encoder.ids(prompt))

    def generate(self, prompts: Sequence[Prompt], limits: Limits) -> Iterator[tuple[int, Completion]]:
        """Complete prompts; see `evaluation.backend.Backend`.

        vLLM has no tokenizer here and knows no stop strings: it generates a few tokens at a time, and what
        has reached a stop string does not go on.

        Yields:
            Place of the prompt and its completion, as they finish.
        """
        # Rounds: round 1 generates ROUND_TOKENS for every prompt; those whose text has reached a stop
        # string, or that ended by themselves, are given out; the rest go into round 2 with what they have as
        # their prompt.
        thinks = any(self._encoder.opens_thoughts(prompt) for prompt in prompts)
        stop = () if thinks else limits.stop  # behind thoughts they are looked for when all is there
        asked = {place: list(self._encoder.ids(prompt)) for place, prompt in enumerate(prompts)}
        made: dict[int, list[int]] = {place: [] for place in asked}
        num_done = 0
        while made:
            room = min(ROUND_TOKENS, limits.max_new_tokens - num_done) if stop else limits.max_new_tokens
            places = list(made)
            parameters = self._parameters(
                [prompts[place] for place in places], limits.drawing, room, num_done
            )
            answers = self._run([asked[place] + made[place] for place in places], parameters)
            num_done += room
            for place, answer in zip(places, answers, strict=True):
                new = [token for token in answer.token_ids if token not in self._encoder.stop_ids]
                ids = made[place] + new
                search = StopSearch(stop)
                text = search.feed(self._encoder.decode(ids))
                text += search.finish()
                reason = _reason(answer, is_cut=search.is_stopped)
                if reason == "length" and num_done < limits.max_new_tokens:
                    made[place] = ids
                    continue
                del made[place]
                completion = Completion(text, reason, len(asked[place]), len(ids) + (reason == "eos"))
                yield place, self._encoder.completed(prompts[place], completion, limits.stop)

    def _parameters(
        self, prompts: Sequence[Prompt], drawing: Drawing | None, room: int, num_done: int
    ) -> Any:
        """Return how tokens are chosen behind ``num_done`` of a completion: of all prompts, or of each."""
        common: dict[str, Any] = {
            "max_tokens": room, "stop_token_ids": list(self._encoder.stop_ids), "detokenize": False,
        }  # fmt: skip
        if drawing is None:
            return self._make_parameters(temperature=0.0, **common)
        common |= {
            "temperature": drawing.temperature, "top_p": drawing.top_p, "top_k": drawing.top_k or -1,
        }  # fmt: skip
        # A seed of its own for each round: the same numbers again would tie what comes to what there is.
        return [self._make_parameters(seed=(each.seed or 0) + num_done, **common) for each in prompts]

    def score_choices(
        self, prompts: Sequence[Prompt], choices: Sequence[str]
    ) -> Iterator[tuple[int, ChoiceScores]]:
        """Return how probable each choice is as the next token; see `evaluation.backend.Backend`.

        A choice that is not among the likeliest tokens is asked for once more, as the end of a prompt.

        Yields:
            Place of the prompt and its scores.

        Raises:
            DataError: a choice is no single token after a prompt.
        """
        asked = [self._encoder.choice_ids(prompt, choices) for prompt in prompts]
        likeliest = self._make_parameters(
            temperature=0.0, max_tokens=1, logprobs=TOP_LOGPROBS, detokenize=False
        )
        answers = self._run([list(context) for context, _ in asked], likeliest)
        listed = [{token: entry.logprob for token, entry in answer.logprobs[0].items()} for answer in answers]
        missing = [
            (place, token)
            for place, (_, ids) in enumerate(asked)
            for token in ids
            if token not in listed[place]
        ]
        self._look_up(asked, missing, listed)
        for place, (_, ids) in enumerate(asked):
            logprobs = tuple(float(listed[place][token]) for token in ids)
            yield place, ChoiceScores(logprobs, self.count_tokens(prompts[place]))

    def _look_up(
        self,
        asked: Sequence[tuple[tuple[int, ...], list[int]]],
        missing: Sequence[tuple[int, int]],
        listed: Sequence[dict[int, float]],
    ) -> None:
        """Add the log-probabilities of tokens that were not among the likeliest."""
        if not missing:
            return
        parameters = self._make_parameters(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        rows = [[*asked[place][0], token] for place, token in missing]
        answers = self._engine.generate(_token_prompts(rows), parameters, use_tqdm=False)
        for (place, token), answer in zip(missing, answers, strict=True):
            listed[place][token] = answer.prompt_logprobs[-1][token].logprob

    def _run(self, rows: Sequence[list[int]], parameters: Any) -> list[Any]:
        """Return the one completion of each row, in their order."""
        answers = self._engine.generate(_token_prompts(rows), parameters, use_tqdm=False)
        return [answer.outputs[0] for answer in answers]


def hash_folder(folder: Path, vocabulary_hash: str) -> tuple[str, str]:
    """Return what tells a model folder from another one of its name, such as the next export.

    vLLM gives no access to the weights and loads formats that we do not read, so whole files are hashed:
    exact, and no slower than the loading, as vLLM reads the same bytes next.

    Args:
        folder: as vLLM is given it; empty texts are returned for what is none (a hub id).
        vocabulary_hash: of its tokenizer.

    Returns:
        16 hexadecimal digits of the weights, and of the configuration with the vocabulary.
    """
    if not folder.is_dir():
        return "", ""
    weights = [path for path in sorted(folder.iterdir()) if path.suffix in WEIGHT_SUFFIXES]
    configs = [path for path in sorted(folder.glob("*config.json")) if path.name != "generation_config.json"]
    found = hashlib.sha256()
    for path in weights:
        found.update(_file_digest(path))
    beside = hashlib.sha256(vocabulary_hash.encode())
    for path in configs:
        beside.update(path.name.encode() + _file_digest(path))
    return found.hexdigest()[:16] if weights else "", beside.hexdigest()[:16]


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _token_prompts(rows: Sequence[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": row} for row in rows]


def _reason(answer: Any, *, is_cut: bool) -> str:
    if is_cut:
        return "stop"
    return "length" if answer.finish_reason == "length" else "eos"
