"""Settings of an evaluation: what is asked."""

from __future__ import annotations

from dataclasses import dataclass

from glmtune.errors import ConfigError
from glmtune.inference.settings import MAX_TEMPERATURE
from glmtune.settings import check_range, setting

ALL = "all"


@dataclass(frozen=True)
class BenchmarkSettings:
    """Which questions to ask."""

    name: str = setting("ceval", "benchmark, or all for the four of the model card")
    data_dir: str | None = setting(
        None,
        "folder with the official files (its own, or one with a folder per benchmark), hub (download), or"
        " sample (the small shipped set); default: $GLMTUNE_DATA, ./data, then sample",
    )
    split: str | None = setting(None, "which split; default: the one that GLM results are reported on")
    subjects: list[str] | None = setting(None, "only these subjects, such as [anatomy,law]")
    limit: int | None = setting(
        None,
        "only the first so many questions of each subject; raise it and what is answered is not asked again",
    )
    num_fewshot: int | None = setting(None, "exemplars in a prompt; default: the protocol's")
    max_new_tokens: int | None = setting(
        None, "tokens an answer may have; default: the protocol's (512 for reasoning). Thinking needs more"
    )
    system: str | None = setting(
        None,
        "system message of your own before every question; of chat models, named in title and fingerprint",
    )
    template: str | None = setting(
        None,
        "file with a Jinja template of your own for every question (sandboxed): `prompt`, `question`,"
        " `options`, `letters`, `subject`; named in title and fingerprint",
    )

    def __post_init__(self) -> None:
        """Check what needs no data.

        Raises:
            ConfigError: a number out of range, or settings that mean nothing for all benchmarks together.
        """
        for name, low in (("limit", 1), ("num_fewshot", 0), ("max_new_tokens", 1)):
            if (value := getattr(self, name)) is not None:
                check_range(f"benchmark.{name}", value, low=low)
        if self.system is not None and not self.system.strip():
            raise ConfigError(
                "`benchmark.system` is empty, which would be no message. Leave it out, or write one."
            )
        if self.name != ALL:
            return
        for name in ("split", "subjects", "num_fewshot"):
            if (value := getattr(self, name)) is not None:
                raise ConfigError(
                    f"`benchmark.{name}` is {value}, but `benchmark=all` asks benchmarks that differ in it."
                    " Leave it out, or name one benchmark."
                )


@dataclass(frozen=True)
class SamplingSettings:
    """How several answers to a question are drawn."""

    temperature: float = setting(0.8, "divides the logits: nearer 0 answers are more alike")
    top_p: float = setting(1.0, "keep the likeliest tokens up to this sum of probabilities; 1 keeps all")
    top_k: int = setting(0, "keep at most this many tokens; 0 keeps all")
    seed: int = setting(0, "of the drawing; question and number of an answer decide the rest")

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value is out of its range.
        """
        if not 0 < self.temperature <= MAX_TEMPERATURE:
            raise ConfigError(
                f"`sampling.temperature` is {self.temperature}, but it must be above 0 and at most"
                f" {MAX_TEMPERATURE:g}. For one greedy answer to each question leave `samples` out."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"`sampling.top_p` is {self.top_p}, but it must be above 0 and at most 1.")
        check_range("sampling.top_k", self.top_k, low=0)
        check_range("sampling.seed", self.seed, low=0)
