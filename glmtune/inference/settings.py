"""Settings of text generation: how the next token is chosen, how long, and how many rows at once."""

from __future__ import annotations

from dataclasses import dataclass

from glmtune.errors import ConfigError
from glmtune.models.settings import KV_CACHES
from glmtune.settings import check_choice, check_range, setting

OFFICIAL_TOP_P = 0.7
OFFICIAL_TEMPERATURE = 0.95
"""Of THUDM/ChatGLM2-6B, ptuning/main.py, its call of ``trainer.predict``: published scores are sampled."""
OFFICIAL_TOP_K = 50
"""Of transformers, which applies it unasked where a script, as the official one, names no other."""
MAX_TEMPERATURE = 100.0
"""Above it every token is as likely as any other; a number beyond is a mistake."""
MAX_PROMPT_LOOKUP_TOKENS = 32
"""Most tokens of a draft: each is computed, and long drafts are rarely right to their end."""
PROMPT_LOOKUP_HELP = (
    "most tokens drafted at once from what stands in prompt and answer and checked in one pass (prompt"
    " lookup); answers stay the same; 0 = none, 7 suits CPUs"
)
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 10.0
"""Logits are divided by it: by a number near 0 they become infinite, and there is nothing to draw from."""


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated. The default is greedy: the same model and prompt give the same answer."""

    do_sample: bool = setting(False, "draw tokens at random instead of taking the most likely one")
    temperature: float | None = setting(None, "with do_sample: divides the logits; official 0.95 if not set")
    top_p: float | None = setting(
        None, "with do_sample: keep the likeliest tokens up to this sum; official 0.7"
    )
    top_k: int | None = setting(None, "with do_sample: keep at most this many tokens, 0 = all; official 50")
    num_beams: int = setting(1, "beams of the beam search; 1 = none")
    repetition_penalty: float = setting(1.0, "divides the logits of tokens seen before; 1 = none")
    max_new_tokens: int | None = setting(
        128, "longest answer, in tokens, end token included; null: data.max_target_length"
    )
    batch_size: int = setting(64, "most rows generated at once")
    max_batch_tokens: int = setting(
        16384, "most tokens at once: each row counts beams x (prompt + max_new_tokens)"
    )
    seed: int = setting(42, "of the drawing; each row has its own stream, so batches do not matter")
    kv_cache: str = setting(
        "plain", "int8 keeps keys and values of earlier tokens as codes: less memory, a small error"
    )
    compile: bool = setting(
        False,
        "generate with code made by torch.compile (norms and MLPs; with beams a whole step): the first answer"
        " waits for the compiler, the others do not",
    )
    prompt_lookup_tokens: int = setting(0, PROMPT_LOOKUP_HELP)

    def __post_init__(self) -> None:
        """Check every rule and report all problems together.

        Raises:
            ConfigError: naming each setting, its value, the rule and the way out.
        """
        check_choice("generation.kv_cache", self.kv_cache, KV_CACHES)
        check_range(
            "generation.prompt_lookup_tokens",
            self.prompt_lookup_tokens,
            low=0,
            high=MAX_PROMPT_LOOKUP_TOKENS,
        )
        problems: list[str] = []
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        given = [f"`generation.{name}` {value}" for name, value in sampling.items() if value is not None]
        if given and not self.do_sample:
            problems.append(
                f"{', '.join(given)} cannot be obeyed: `generation.do_sample` is false, so the most likely"
                " token is always taken. Add `generation.do_sample=true` or leave them out."
            )
        if self.do_sample and self.num_beams > 1:
            problems.append(
                f"`generation.num_beams` is {self.num_beams}, but beams and `generation.do_sample=true`"
                " exclude each other. Use one of them."
            )
        for name, low in (
            ("num_beams", 1),
            ("max_new_tokens", 1),
            ("batch_size", 1),
            ("max_batch_tokens", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                problems.append(f"`generation.{name}` is {value}, but it must be at least {low}.")
        if self.prompt_lookup_tokens and self.num_beams > 1:
            problems.append(
                f"`generation.prompt_lookup_tokens` is {self.prompt_lookup_tokens}, but beams take no drafts,"
                f" and `generation.num_beams` is {self.num_beams}. Leave one of them out."
            )
        if self.temperature is not None and not 0 < self.temperature <= MAX_TEMPERATURE:
            problems.append(
                f"`generation.temperature` is {self.temperature}, but it must be above 0 and at most"
                f" {MAX_TEMPERATURE:g}. For the most likely token each time use `generation.do_sample=false`."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"`generation.top_p` is {self.top_p}, but it must be above 0 and at most 1.")
        if self.top_k is not None and self.top_k < 0:
            problems.append(
                f"`generation.top_k` is {self.top_k}, but it must be at least 0 (0 keeps all tokens)."
            )
        if not MIN_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY:
            problems.append(
                f"`generation.repetition_penalty` is {self.repetition_penalty}, but it must be from"
                f" {MIN_REPETITION_PENALTY:g} to {MAX_REPETITION_PENALTY:g} (1 = none)."
            )
        if self.compile and self.kv_cache != "plain" and self.num_beams > 1:
            problems.append(
                f"`generation.kv_cache` is {self.kv_cache}, but `generation.compile=true` with"
                f" `generation.num_beams` {self.num_beams} needs a cache of fixed size, in the model's type."
                " Leave one of the three out."
            )
        if self.seed < 0:
            problems.append(f"`generation.seed` is {self.seed}, but it must be at least 0.")
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def answer_tokens(self) -> int:
        """Tokens of the longest answer; for whoever generates, when ``max_new_tokens`` is a number."""
        assert self.max_new_tokens is not None
        return self.max_new_tokens

    @property
    def sampling(self) -> tuple[float, int, float]:
        """Temperature, top-k and top-p in force; the official values where none were given."""
        return (
            OFFICIAL_TEMPERATURE if self.temperature is None else self.temperature,
            OFFICIAL_TOP_K if self.top_k is None else self.top_k,
            OFFICIAL_TOP_P if self.top_p is None else self.top_p,
        )


@dataclass(frozen=True)
class DraftSettings:
    """A smaller model that drafts tokens, which the other checks in one pass; answers stay the same."""

    source: str | None = setting(
        None, "a smaller model of the same vocabulary, or the model itself with draft.quantization"
    )
    quantization: str | None = setting(None, "of the model that drafts, on loading: int4, int8, ...")
    num_tokens: int = setting(4, "most tokens drafted at once")

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a number out of range, or a setting of a model that is not there.
        """
        check_range("draft.num_tokens", self.num_tokens, low=1, high=MAX_PROMPT_LOOKUP_TOKENS)
        if self.source is None and self.quantization is not None:
            raise ConfigError(
                f"`draft.quantization` is `{self.quantization}`, but no model is to draft. Add"
                " `draft.source=MODEL`, or leave it out."
            )


@dataclass(frozen=True)
class EngineSettings:
    """How the engine computes; results do not depend on it, but for the error of ``kv_cache=int8``."""

    batch_size: int = setting(128, "most rows at once")
    max_batch_tokens: int = setting(65536, "most tokens whose keys and values are held, memory permitting")
    read_tokens: int | None = setting(
        None, "most prompt tokens read in one forward pass (a longer prompt in pieces); default: by device"
    )
    piece_tokens: int | None = setting(
        None, "prompt tokens read between two steps while answers are streamed; default: by device"
    )
    max_waiting: int = setting(256, "most requests in the queue; more are refused until there is room")
    reuse_caches: bool = setting(
        True, "keep keys and values of finished requests for later ones (not with ChatGLM-6B or int8)"
    )
    share_prefixes: bool = setting(True, "read what prompts begin with once (never with ChatGLM-6B)")
    min_shared_gain: int = setting(512, "tokens that reading a shared prompt once must spare")
    kv_cache: str = setting(
        "plain", "int8 keeps the keys and values of a row's own tokens as codes: less memory, a small error"
    )
    compile: bool = setting(False, "compile norms and MLPs with torch.compile first (needs a compiler)")
    prompt_lookup_tokens: int = setting(0, PROMPT_LOOKUP_HELP)

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a number below 1; no such ``kv_cache``.
        """
        check_choice("engine.kv_cache", self.kv_cache, KV_CACHES)
        lookup = self.prompt_lookup_tokens
        check_range("engine.prompt_lookup_tokens", lookup, low=0, high=MAX_PROMPT_LOOKUP_TOKENS)
        for name in ("batch_size", "max_batch_tokens", "read_tokens", "piece_tokens", "max_waiting",
                     "min_shared_gain"):  # fmt: skip
            if getattr(self, name) is not None:
                check_range(f"engine.{name}", getattr(self, name), low=1)
