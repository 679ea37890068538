"""Settings of an evaluation: what is asked."""

from __future__ import annotations

from dataclasses import dataclass

from glmtune.errors import ConfigError
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
