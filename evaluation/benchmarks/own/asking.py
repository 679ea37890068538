"""A benchmark that ships, asked in words of a user's own: a system message, a template of the question.

What is asked then is not the published protocol any more, so that all of it is named: in the title, in the
fingerprint (no run of other words is gone on with, none is compared), and published figures stand beside none
of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from jinja2 import Environment, TemplateError, meta

from evaluation.benchmarks.benchmark import read_text
from evaluation.benchmarks.own.prompts import Templates
from evaluation.sample import ALPHABET, Prompt, Sample
from evaluation.task import PreparedProtocol
from glmtune.errors import ConfigError, DataError
from glmtune.messages import Message

NAMES = ("prompt", "question", "options", "letters", "subject")
"""What a template may name; `prompt` is the question as the protocol asks it."""
KEY = "template"


@dataclass(frozen=True)
class OwnWords:
    """What stands in place of a protocol's words.

    Attributes:
        system: message before every question; None: none.
        path: of the template; None: as the protocol asks.
    """

    system: str | None = None
    path: Path | None = None

    @property
    def is_given(self) -> bool:
        """Whether anything is said otherwise."""
        return self.system is not None or self.path is not None

    def told(self) -> dict[str, str]:
        """Return what the fingerprint has of it; empty where nothing is said otherwise."""
        found: dict[str, str] = {}
        if self.system is not None:
            found["system"] = self.system
        if self.path is not None:
            digest = hashlib.sha256(self._source.encode()).hexdigest()
            found |= {"template": self.path.name, "template_hash": digest[:16]}
        return found

    def refuse_for(self, file: str) -> None:
        """Refuse to change what a user's own benchmark says itself.

        Args:
            file: that describes it.

        Raises:
            ConfigError: always.
        """
        name = "system" if self.system is not None else "template"
        raise ConfigError(
            f"`benchmark.{name}` is given, but {file} says itself how its questions are asked. Write it"
            " there: `turns` may begin with a system message, `prompt` is the template."
        )

    def applied_to(self, prepared: PreparedProtocol, *, is_chat: bool, protocol: str) -> PreparedProtocol:
        """Return a protocol that asks in these words.

        Args:
            prepared: the protocol.
            is_chat: whether prompts are conversations.
            protocol: its name, for errors.

        Raises:
            ConfigError: a base model has no system message, or exemplars would be lost.
            DataError: the template cannot be read or is no Jinja.
        """
        if self.system is not None and not is_chat:
            raise ConfigError(
                "`benchmark.system` is given, but a base model continues plain text, which has no system"
                " message. Put it into `benchmark.template`, ask a chat model, or set `is_chat=true`."
            )
        named = self._named  # read before anything is asked
        if (
            prepared.num_fewshot
            and self.path is not None
            and "prompt" not in named
            and not _has_turns(prepared)
        ):
            raise ConfigError(
                f"`benchmark.template` is `{self.path}`, which does not name `prompt`, so that the"
                f" {prepared.num_fewshot} exemplars of `protocol={protocol}` would be lost. Write"
                " `{{ prompt }}` where they and the question shall stand, or set `benchmark.num_fewshot=0`."
            )
        second, shorten = prepared.write_extraction, prepared.shorten
        return replace(
            prepared,
            write=lambda sample, number: self._asked(sample, prepared.write(sample, number)),
            shorten=None
            if shorten is None
            else lambda sample, count: self._asked(sample, shorten(sample, count)),
            write_extraction=None
            if second is None
            else lambda sample, said: self._with_system(second(sample, said)),
        )

    # ---- the template ----

    @cached_property
    def _source(self) -> str:
        assert self.path is not None
        return read_text(self.path, name="`benchmark.template`", way_out="Name a text file with Jinja in it.")

    @cached_property
    def _named(self) -> frozenset[str]:
        """Return the names that the template uses.

        Raises:
            DataError: it is no Jinja, or uses a name that there is not, or none at all.
        """
        if self.path is None:
            return frozenset()
        try:
            # Parsed only: what it does is run in the sandbox of `Templates`.
            named = frozenset(
                meta.find_undeclared_variables(Environment(autoescape=True).parse(self._source))
            )
        except TemplateError as error:
            raise DataError(f"it is no Jinja template ({error}).", path=self.path) from None
        if unknown := sorted(named - {*NAMES}):
            raise DataError(f"it names `{unknown[0]}`, but there are {', '.join(NAMES)}.", path=self.path)
        if not named & {"prompt", "question"}:
            raise DataError(
                "it names neither `prompt` nor `question`, so that every question would be the same. Write"
                " `{{ question }}` where it shall stand.",
                path=self.path,
            )
        return named

    @cached_property
    def _templates(self) -> Templates:
        return Templates(self.path, {})

    def _asked(self, sample: Sample, prompt: Prompt) -> Prompt:
        if self.path is None:
            return self._with_system(prompt)
        if prompt.text is not None:
            return replace(prompt, text=self._rendered(sample, prompt.text))
        *before, last = prompt.turns
        turns = (*before, Message(last.role, self._rendered(sample, last.content)))
        return self._with_system(replace(prompt, turns=turns))

    def _rendered(self, sample: Sample, prompt: str) -> str:
        values: Mapping[str, object] = {
            "prompt": prompt,
            "question": sample.question,
            "options": list(sample.choices),
            "letters": list(ALPHABET[: len(sample.choices)]),
            "subject": sample.subject,
        }
        # An editor ends a file with a line break, behind which a model would begin its answer otherwise.
        return self._templates.render(KEY, self._source, values).rstrip("\n")

    def _with_system(self, prompt: Prompt) -> Prompt:
        if self.system is None or not prompt.turns:
            return prompt
        return replace(prompt, turns=(Message("system", self.system), *prompt.turns))


def _has_turns(prepared: PreparedProtocol) -> bool:
    """Say whether exemplars are turns before the question, which a template of the question leaves alone."""
    shots = prepared.few_shot
    subject = next(iter(shots.exemplars), None) if shots is not None else None
    if subject is None:
        return False
    probe = prepared.write(Sample("", subject, 0, "?", choices=("", "", "", "")), prepared.num_fewshot)
    return len(probe.turns) > 1
