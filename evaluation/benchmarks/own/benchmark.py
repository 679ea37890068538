"""A described benchmark as everything else knows it: a `Benchmark`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluation.backend import Limits
from evaluation.benchmarks.benchmark import Ask, Benchmark
from evaluation.benchmarks.own.description import GRADED, FewShotPart, read_description
from evaluation.benchmarks.own.prompts import Templates
from evaluation.benchmarks.own.reading import ANY, rules_of
from evaluation.benchmarks.own.rows import HUB, Row, read_rows
from evaluation.fewshot import Exemplar, FewShot, as_text, turns_prompt
from evaluation.metrics import MACRO, MICRO, Groups
from evaluation.sample import ALPHABET, Prompt, Sample
from evaluation.task import CHOICES, GENERATE, GENERATE_THEN_CHOICES, PreparedProtocol
from glmtune.errors import ConfigError, DataError
from glmtune.messages import Message

PROTOCOL = "own"
KINDS = {"generate": GENERATE, "choices": CHOICES, "both": GENERATE_THEN_CHOICES}


class OwnBenchmark:
    """The questions and prompts of a YAML file.

    Attributes:
        path: of the file.
        description: what it says.
    """

    def __init__(self, path: Path) -> None:
        """Read the file; questions are read when they are asked for.

        Raises:
            DataError: see `read_description`; a rule, or a test of one, does not hold.
        """
        self.path = path
        self.description, self._lines = read_description(path)
        self._templates = Templates(path, self._lines)
        self._rows: dict[str, list[Row]] = {}
        # Of the split that was loaded last: its questions are asked, and their templates need whole rows.
        self._values: dict[tuple[str, int], Mapping[str, Any]] = {}
        self.rules = rules_of(self.description, path, self._lines, num_options=self._num_options)

    def load(self, folder: Path, split: str, subjects: Sequence[str]) -> list[Sample]:
        """Return the questions of some subjects of a split, in the order of the file.

        Raises:
            DataError: a file cannot be read, or a row lacks what the description names.
        """
        del folder
        self._values.clear()
        samples: list[Sample] = []
        counts: dict[str, int] = {}
        for row in self._of(split):
            subject = self._subject(row, split)
            index = counts.get(subject, 0)
            counts[subject] = index + 1
            if subject not in subjects:
                continue
            sample = self._sample(row, split, subject, index)
            self._values[sample.key] = row.values
            samples.append(sample)
        wanted = {subject: place for place, subject in enumerate(subjects)}
        return sorted(samples, key=lambda sample: (wanted[sample.subject], sample.index))

    def subjects(self, split: str) -> tuple[str, ...]:
        """Return the subjects of a split in the order in which they appear."""
        return tuple(dict.fromkeys(self._subject(row, split) for row in self._of(split)))

    def groups(self, split: str) -> Groups:
        """Return how subjects are averaged.

        Raises:
            DataError: a group names a subject that there is not.
        """
        known = self.subjects(split)
        categories: dict[str, str] = {}
        for category, members in self.description.groups.items():
            for subject in members:
                if subject not in known:
                    raise DataError(
                        f"`groups.{category}` names `{subject}`, but the subjects of `{split}` are "
                        f"{', '.join(known[:20])}.",
                        path=self.path,
                        line=self._lines["groups"],
                    )
                categories[subject] = category
        return Groups(headline=MACRO if self.description.average == "macro" else MICRO, categories=categories)

    def prepare(self, ask: Ask) -> PreparedProtocol:
        """Make prompts ready.

        Raises:
            ConfigError: a base model is to answer turns of a chat.
            DataError: a template cannot be rendered.
        """
        about = self.description
        if about.turns is not None and not ask.is_chat:
            raise ConfigError(
                f"{self.path} has `turns`, but a base model continues plain text. Give it a `prompt`, ask a "
                "chat model, or set `is_chat=true`."
            )
        shots = self._exemplars(ask.subjects)
        letters = ALPHABET[: self._num_options]
        return PreparedProtocol(
            kind=KINDS[about.kind],
            rules=self.rules,
            write=lambda sample, number: self._prompt(
                sample, shots.get(sample.subject, [])[:number], ask.is_chat
            ),
            limits=Limits(1 if about.kind == "choices" else about.max_new_tokens, stop=tuple(about.stop)),
            # An answer of a chat begins without a blank; behind the cue of a text it has one.
            choices=()
            if about.kind == "generate"
            else tuple(letters if ask.is_chat else (f" {a}" for a in letters)),
            write_extraction=None
            if about.kind != "both"
            else lambda sample, said: self._second(sample, said, ask),
            num_fewshot=min(map(len, shots.values())) if shots else 0,
            few_shot=FewShot(shots, lambda sample: self._text(self._names(sample))) if shots else None,
        )

    # ---- questions ----

    def _of(self, split: str) -> list[Row]:
        if split not in self._rows:
            self._rows[split] = read_rows(self.path.parent, self.description.files[split])
        return self._rows[split]

    def _place(self, row: Row, split: str) -> dict[str, Any]:
        return {"path": self.path.parent / self.description.files[split], "line": row.line}

    def _subject(self, row: Row, split: str) -> str:
        column = self.description.subject
        return self.path.stem if column is None else str(self._value(row, column, split, "subject"))

    def _value(self, row: Row, column: str, split: str, key: str) -> Any:
        if column not in row.values:
            there = ", ".join(f"`{name}`" for name in list(row.values)[:12])
            raise DataError(
                f"this row has no `{column}`, which {self.path.name} names as `{key}`; it has {there}.",
                **self._place(row, split),
            )
        return row.values[column]

    @cached_property
    def _num_options(self) -> int:
        """Most options that a question of the first split has."""
        if self.description.options is None:
            return 0
        split = next(iter(self.description.files))
        return max(len(self._options(row, split)) for row in self._of(split))

    def _options(self, row: Row, split: str) -> list[str]:
        columns = self.description.options
        if columns is None:
            return []
        if isinstance(columns, list):
            return [str(self._value(row, column, split, "options")) for column in columns]
        found = self._value(row, columns, split, "options")
        if not isinstance(found, list) or not 2 <= len(found) <= len(ALPHABET):
            raise DataError(
                f"`{columns}` must be a list of 2 to {len(ALPHABET)} options, but it is {str(found)[:60]!r}.",
                **self._place(row, split),
            )
        return [str(option) for option in found]

    def _sample(self, row: Row, split: str, subject: str, index: int) -> Sample:
        options = self._options(row, split)
        # What is compared are the same letters behind every prompt; an answer in words is read for each
        # question.
        is_scored = self.description.kind != "generate"
        if is_scored and options and len(options) != self._num_options:
            raise DataError(
                f"this row has {len(options)} options, but others have {self._num_options}. For `kind: "
                f"{self.description.kind}` all must have as many: put others into a benchmark of their own, "
                "or let the model write (`kind: generate`).",
                **self._place(row, split),
            )
        values = {
            **row.values,
            "options": options,
            "letters": list(ALPHABET[: len(options)]),
            "subject": subject,
        }
        question = self._templates.render("question", self.description.question, values)
        return Sample(
            benchmark=self.path.stem,
            subject=subject,
            index=index,
            question=question,
            choices=tuple(options),
            answer=self._key(row, options, split),
            row_id=str(index),
            cluster=self._cluster(row, split),
        )

    def _cluster(self, row: Row, split: str) -> str:
        column = self.description.cluster
        if column is None:
            return ""
        name = str(self._value(row, column, split, "cluster") or "").strip()
        if not name:
            raise DataError(
                f"`{column}` is empty, but it names what the question shares with others, and every question"
                " needs a name there. Give one of its own to a question that shares nothing.",
                **self._place(row, split),
            )
        return name

    def _key(self, row: Row, options: Sequence[str], split: str) -> str:
        given = self._given(row, split)
        if options:
            return self._letter(given, options, row, split)
        if isinstance(given, list):
            if self.description.score not in ("any_of", *GRADED) or not given:
                raise DataError(
                    f"`{self.description.answer}` is a list: `score: any_of` takes one with some keys, as do "
                    f"{', '.join(GRADED)}.",
                    **self._place(row, split),
                )
            return ANY.join(str(key) for key in given)
        if given is None or not str(given).strip():
            raise DataError(f"`{self.description.answer}` is empty.", **self._place(row, split))
        return str(given)

    def _given(self, row: Row, split: str) -> Any:
        source = self.description.answer
        if "{{" not in source:
            return self._value(row, source, split, "answer")
        return self._templates.render("answer", source, row.values)

    def _letter(self, given: Any, options: Sequence[str], row: Row, split: str) -> str:
        """Return the letter that a key stands for: itself, a place from 0, or an option's text."""
        letters = ALPHABET[: len(options)]
        text = str(given).strip()
        if text in letters and len(text) == 1:
            return text
        if text in options:
            return letters[list(options).index(text)]
        if text.isdecimal() and int(text) < len(options):
            return letters[int(text)]
        raise DataError(
            f"`{self.description.answer}` is {str(given)[:40]!r}, but must be one of {', '.join(letters)}, a "
            f"place from 0 to {len(options) - 1}, or the text of an option.",
            **self._place(row, split),
        )

    # ---- prompts ----

    def _names(self, sample: Sample, row: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return {
            **(self._values[sample.key] if row is None else row),
            "question": sample.question,
            "options": list(sample.choices),
            "letters": list(ALPHABET[: len(sample.choices)]),
            "subject": sample.subject,
        }

    def _text(self, names: Mapping[str, Any]) -> str:
        assert self.description.prompt is not None
        # YAML's `|` ends with a line break, behind which a model would begin an answer otherwise.
        return self._templates.render("prompt", self.description.prompt, names).rstrip("\n")

    def _prompt(self, sample: Sample, shots: Sequence[Exemplar], is_chat: bool) -> Prompt:
        if self.description.turns is not None:
            names = self._names(sample)
            turns = (
                Message(turn.role, self._templates.render(f"turns[{place}]", turn.content, names))
                for place, turn in enumerate(self.description.turns)
            )
            return Prompt(turns=tuple(turns))
        asked = self._text(self._names(sample))
        if is_chat:
            return turns_prompt("", shots, asked)
        return Prompt(text=as_text("", shots, asked), num_fewshot=len(shots))

    def _second(self, sample: Sample, completion: str, ask: Ask) -> Prompt:
        assert self.description.second_prompt is not None
        names = self._names(sample)
        names |= {"prompt": self._text(names), "completion": completion}
        text = self._templates.render("second_prompt", self.description.second_prompt, names).rstrip("\n")
        return Prompt(turns=(Message("user", text),)) if ask.is_chat else Prompt(text=text)

    def _exemplars(self, subjects: Sequence[str]) -> dict[str, list[Exemplar]]:
        """Return the examples of each subject: its own where their rows name one, else the same for all."""
        part = self.description.few_shot
        if part is None:
            return {}
        column, rows = self.description.subject, self._of(part.split)
        has_subjects = column is not None and all(column in row.values for row in rows)
        shots: dict[str, list[Exemplar]] = {}
        for subject in subjects:
            own = [row for row in rows if not has_subjects or self._subject(row, part.split) == subject]
            if len(own) < part.number:
                raise DataError(
                    f"`few_shot.number` is {part.number}, but `{part.split}` has {len(own)} rows for the"
                    f" subject `{subject}`. Lower it, or add examples.",
                    path=self.path,
                    line=self._lines["few_shot"],
                )
            shots[subject] = [
                self._exemplar(row, part, subject, place) for place, row in enumerate(own[: part.number])
            ]
        return shots

    def _exemplar(self, row: Row, part: FewShotPart, subject: str, place: int) -> Exemplar:
        sample = self._sample(row, part.split, subject, place)
        names = self._names(sample, row.values)
        answer = self._templates.render(
            "few_shot.answer", part.answer, {**names, "answer": sample.answer.split(ANY)[0]}
        )
        return Exemplar(self._text(names), answer if answer[:1].isspace() else f" {answer}")


def reads_files_only(path: Path) -> bool:
    """Say whether all questions of a YAML file are in files, and none on the hub.

    Raises:
        DataError: see `read_description`.
    """
    return not any(name.startswith(HUB) for name in read_description(path)[0].files.values())


def own_benchmark(path: Path, split: str | None) -> Benchmark:
    """Make a benchmark of a YAML file.

    Args:
        path: of the file.
        split: whose subjects it has; None takes the first.

    Raises:
        DataError: the file, or one that it names, cannot be used.
        ConfigError: it has no such split.
    """
    own = OwnBenchmark(path)
    splits = tuple(own.description.files)
    if split is not None and split not in splits:
        raise ConfigError(f"`benchmark.split` is `{split}`, but {path} has {', '.join(splits)}.")
    return Benchmark(
        name=path.stem,
        title=own.description.title,
        licence=own.description.licence,
        splits=splits,
        subjects=own.subjects(split or splits[0]),
        protocols={PROTOCOL: own.prepare},
        chat_protocol=PROTOCOL,
        base_protocol=PROTOCOL,
        groups=own.groups,
        is_here=lambda folder: folder == path.parent,
        load=own.load,
        home=path.parent,
    )
