"""A task: the questions of one benchmark split together with the protocol that asks and scores them.

What runs and reports need is here and nothing of a benchmark's files, so that the runner has no case for any
benchmark.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from evaluation.backend import Drawing, Limits
from evaluation.extraction.text import without_thinking
from evaluation.fewshot import FewShot
from evaluation.metrics import Groups
from evaluation.sample import ALPHABET, ChoiceScores, Prompt, Sample
from glmtune.errors import ConfigError

GENERATE = "generate"
CHOICES = "choices"
GENERATE_THEN_CHOICES = "generate_then_choices"

TEXT = "text"
SCORES = "scores"


def is_exactly_the_answer(extracted: str, sample: Sample) -> bool:
    """Compare an extracted answer with the gold answer, character by character."""
    return extracted == sample.answer


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to read an answer from what the model gave, and to compare it.

    Attributes:
        about: one line for reports.
        extract: completion and sample to the answer, None where nothing is found (an extraction failure).
        matches: whether an extracted answer is the sample's gold answer; None where that could not be found
            out (a formula that no computer algebra gets through).
        reads: ``text`` (the completion) or ``scores`` (the best choice's letter is handed to ``extract``).
        grade: extracted answer and sample to a grade from 0 to 1, for answers that are more or less right;
            ``matches`` is then left out, and only full marks count as right.
        weigh: sample to its weight in the averages of this rule; None weighs all alike, as the deciding rule
            must: paired tests, clustered errors and several answers count questions.
        version: raised whenever the rule may read the same answer otherwise. Answers are kept and read
            anew, so that it decides whether results may be compared, and not whether a run may go on.
    """

    about: str
    extract: Callable[[str, Sample], str | None]
    matches: Callable[[str, Sample], bool | None] = is_exactly_the_answer
    reads: str = TEXT
    version: int = 1
    grade: Callable[[str, Sample], float] | None = None
    weigh: Callable[[Sample], float] | None = None


@dataclass(frozen=True, slots=True)
class PreparedProtocol:
    """A protocol with its exemplars read: how to ask, how far to generate, how to read the answer.

    Attributes:
        kind: ``generate``, ``choices`` (next-token scores only) or ``generate_then_choices`` (two stages).
        rules: extraction rules by name, the official one first.
        write: sample and number of exemplars to its prompt; the question is never cut.
        limits: of the generation; unused by ``choices``.
        choices: strings as they follow the (last) prompt, such as ``A`` or `` A``, in letter order.
        write_extraction: sample and first completion to the second prompt (``generate_then_choices``).
        num_fewshot: exemplars in an uncut prompt.
        version: raised whenever prompts or limits change in a way that can move a score.
        few_shot: the exemplars; None where there are none.
        max_new_tokens_of: sample to the tokens its answer may have, where they differ; ``limits`` has the
            most.
        shorten: sample and number of characters to the prompt with so many of the text it is about; None
            where questions are about no text, and are never cut.
        longest: sample to all characters of that text.
    """

    kind: str
    rules: Mapping[str, Rule]
    write: Callable[[Sample, int], Prompt]
    limits: Limits
    choices: tuple[str, ...] = ()
    write_extraction: Callable[[Sample, str], Prompt] | None = None
    num_fewshot: int = 0
    version: int = 1
    few_shot: FewShot | None = None
    max_new_tokens_of: Callable[[Sample], int] | None = None
    shorten: Callable[[Sample, int], Prompt] | None = None
    longest: Callable[[Sample], int] | None = None

    def __post_init__(self) -> None:
        """Check that the rule that decides does not weigh questions."""
        assert all(rule.weigh is None for rule in list(self.rules.values())[:1]), "see `Rule.weigh`"


@dataclass(frozen=True)
class Task:
    """Everything an evaluation needs to know about what it asks.

    Attributes:
        benchmark: name, such as ``ceval``.
        title: name for readers, such as ``C-Eval``.
        protocol: name, such as ``zero_shot_cot``.
        split: such as ``val``.
        samples: the questions, subject by subject in the official order.
        prepared: the protocol made ready for these questions.
        licence: of the data.
        source: folder or hub id the data came from.
        groups: how the benchmark averages its subjects; hand it to `evaluation.metrics.summarize_outcomes`.
        labelled: whether the split has gold answers (C-Eval's test split has none).
        is_sample_set: whether this is the small set shipped with glmtune, never comparable with published
            figures.
        is_partial: whether ``subjects`` or ``limit`` left questions out.
        own_subjects: subjects that are the user's and not the benchmark's; in no official average.
        file: that describes the benchmark, where it is a user's own; else empty.
        own_prompt: what a user has put in place of the protocol's words: ``system`` (a text), ``template``
            (name of its file) and ``template_hash``; empty where the protocol is asked as it stands.
    """

    benchmark: str
    title: str
    protocol: str
    split: str
    samples: tuple[Sample, ...]
    prepared: PreparedProtocol
    licence: str
    source: str
    groups: Groups = field(default_factory=Groups)
    labelled: bool = True
    is_sample_set: bool = False
    is_partial: bool = False
    own_subjects: tuple[str, ...] = ()
    file: str = ""
    own_prompt: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_own(self) -> bool:
        """Whether nothing of the benchmark itself is asked."""
        return bool(self.own_subjects) and all(s.subject in self.own_subjects for s in self.samples)

    @property
    def own_prompt_words(self) -> tuple[str, ...]:
        """How the protocol is asked otherwise than published, in words for titles."""
        template = self.own_prompt.get("template")
        return (
            *(["own system message"] if "system" in self.own_prompt else []),
            *([f"template {template}"] if template else []),
        )

    @property
    def categories(self) -> Mapping[str, str]:
        """Subject to category; empty where the benchmark has none."""
        return self.groups.categories

    @property
    def headline(self) -> str:
        """The average published for this benchmark: ``accuracy_micro`` or ``accuracy_macro``."""
        return self.groups.headline

    @property
    def kind(self) -> str:
        """``generate``, ``choices`` or ``generate_then_choices``."""
        return self.prepared.kind

    @property
    def choices(self) -> tuple[str, ...]:
        """Strings whose next-token probabilities are compared; empty for ``generate``."""
        return self.prepared.choices

    @property
    def limits(self) -> Limits:
        """How far to generate."""
        return self.prepared.limits

    def max_new_tokens(self, sample: Sample) -> int:
        """Return the tokens that the answer to a question may have."""
        of_sample = self.prepared.max_new_tokens_of
        return self.limits.max_new_tokens if of_sample is None else of_sample(sample)

    def drawn(self, drawing: Drawing) -> Task:
        """Return the same task with answers that are drawn; what it asks stays the same.

        Args:
            drawing: how.

        Raises:
            ConfigError: nothing is generated, so there is nothing to draw.
        """
        if self.kind == CHOICES:
            raise ConfigError(
                f"`samples` is given, but {self.title} with protocol `{self.protocol}` compares probabilities"
                " and generates nothing, so every answer would be the same. Leave `samples` out, or use a"
                " protocol in which the model writes, such as `protocol=zero_shot_cot`."
            )
        limits = dataclasses.replace(self.limits, drawing=drawing)
        return dataclasses.replace(self, prepared=dataclasses.replace(self.prepared, limits=limits))

    @property
    def rules(self) -> Mapping[str, Rule]:
        """Extraction rules by name, the official one first."""
        return self.prepared.rules

    @property
    def num_fewshot(self) -> int:
        """Exemplars in an uncut prompt."""
        return self.prepared.num_fewshot

    @property
    def protocol_version(self) -> str:
        """Protocol name and version, such as ``zero_shot_cot/1``."""
        return f"{self.protocol}/{self.prepared.version}"

    def prompt(self, sample: Sample, num_fewshot: int | None = None) -> Prompt:
        """Return the (first) prompt of a question.

        Args:
            sample: one of ``samples``.
            num_fewshot: exemplars to keep, counted from the first; None keeps all. Fewer make room for a
                question that would not fit the model's context: exemplars are lost, never the question.
        """
        return self.prepared.write(sample, self.num_fewshot if num_fewshot is None else num_fewshot)

    def extraction_prompt(self, sample: Sample, completion: str) -> Prompt:
        """Return the second prompt of a two-stage protocol, which asks for the letter.

        Args:
            sample: one of ``samples``.
            completion: what the model generated in the first stage; its thinking is left out. Where it is too
                long, hand in a shortened one (cut at its end), so that the cue after it stays.
        """
        assert self.prepared.write_extraction is not None, f"{self.protocol} has one stage only"
        return self.prepared.write_extraction(sample, without_thinking(completion))

    def answers(
        self, sample: Sample, *, text: str | None = None, scores: ChoiceScores | None = None
    ) -> dict[str, str | None]:
        """Read the answer under every rule that can be applied to what is there.

        Args:
            sample: the question.
            text: completion (of the first stage), if there is one; no rule is shown the thinking in it.
            scores: choice scores, if there are some.

        Returns:
            Rule name to extracted answer, in the order of ``rules``; None is an extraction failure. A rule
            whose input is missing (a saved completion without choice scores) is left out.
        """
        letter = None if scores is None else ALPHABET[scores.best]
        given = {TEXT: None if text is None else without_thinking(text), SCORES: letter}
        found: dict[str, str | None] = {}
        for name, rule in self.rules.items():
            value = given[rule.reads]
            if value is not None:
                found[name] = rule.extract(value, sample)
        return found

    def is_correct(self, sample: Sample, extracted: str | None, rule: str) -> bool | None:
        """Say whether an answer extracted under a rule is right; a failed extraction never is.

        Returns:
            None where the rule could not find it out, which counts as wrong.
        """
        if self.rules[rule].grade is not None:
            return self.grade(sample, extracted, rule) == 1.0
        return extracted is not None and self.rules[rule].matches(extracted, sample)

    def grade(self, sample: Sample, extracted: str | None, rule: str) -> float | None:
        """Return the grade of an extracted answer, 0 where nothing was; None under rules that give none."""
        grade = self.rules[rule].grade
        if grade is None:
            return None
        return 0.0 if extracted is None else min(1.0, max(0.0, grade(extracted, sample)))

    def is_graded(self, rule: str) -> bool:
        """Say whether a rule finds answers more or less right, and not right or wrong."""
        return self.rules[rule].grade is not None

    @cached_property
    def data_hash(self) -> str:
        """SHA-256 over the questions, options and gold answers, whatever file layout they came in.

        C-Eval comes as CSV and as JSON lines: the same val questions have the same hash, and runs over both
        may be compared.
        """
        return _hash_of(_sample_parts(sample) for sample in self.samples)

    @cached_property
    def prompt_hash(self) -> str:
        """SHA-256 over all uncut prompts and the second-stage prompt of an empty completion."""

        def parts() -> Iterable[list[object]]:
            for sample in self.samples:
                yield prompt_parts(self.prompt(sample))
                if self.prepared.write_extraction is not None:
                    yield prompt_parts(self.extraction_prompt(sample, ""))

        return _hash_of(parts())


def _sample_parts(sample: Sample) -> list[object]:
    # What only some questions have comes last, so that the hashes of all others stay those of earlier runs.
    own = [turn.content for turn in sample.history] + ([sample.rule] if sample.rule else [])
    return [sample.subject, sample.index, sample.question, *sample.choices, sample.answer, *own]


def prompt_parts(prompt: Prompt) -> list[object]:
    """Return a prompt as plain values, for hashing and for files."""
    if prompt.text is not None:
        return [prompt.text]
    return [[turn.role, turn.content] for turn in prompt.turns]


def hash_prompt(prompt: Prompt) -> str:
    """Return what names one prompt in a journal: the first 16 hexadecimal digits of its SHA-256."""
    return _hash_of([prompt_parts(prompt)])[:16]


def _hash_of(rows: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        # A model may cut a surrogate pair in two, and a second prompt repeats what it wrote.
        digest.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace"))
        digest.update(b"\n")
    return digest.hexdigest()
