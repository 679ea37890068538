"""Runs as scores per question, whoever made them, and matched question by question: the sides of a table.

Two runs of glmtune have the same rows of the same files. Runs of other tools name their questions otherwise,
so a question is known by its text there (blanks do not count, nor does the order of the questions), with its
options where both sides have them, and the second of two equal ones by being the second.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.compare.pairing.contained import find_in_prompts
from evaluation.compare.pairing.match import check_comparable
from evaluation.compare.pairing.questions import find_questions, groups_of
from evaluation.compare.pairing.runs import Run
from evaluation.metrics import MACRO, MICRO, Outcome
from evaluation.running.fingerprint import described
from evaluation.statistics.clustered import macro_weights
from glmtune.errors import ConfigError, DataError

OF_PROMPTS = "OpenCompass"
"""The tool that keeps prompts and not questions."""
MAY_DIFFER = ("do_sample",)
"""Runs of one and of several answers to the same questions can be compared: both have a score for each."""


@dataclass(frozen=True, slots=True)
class QuestionText:
    """What a question is known by where it has no number in common.

    Attributes:
        text: of the question.
        choices: of its options; empty where they are not known.
    """

    text: str
    choices: tuple[str, ...] = ()

    def digest(self, *, with_choices: bool) -> str:
        """Return a hash that does not change with blanks.

        Args:
            with_choices: of question and options; else of the question alone.
        """
        parts = [self.text, *(self.choices if with_choices else ())]
        plain = "\n".join(map(without_blanks, parts))
        return hashlib.sha256(plain.encode("utf-8", "backslashreplace")).hexdigest()


def without_blanks(text: str) -> str:
    """Return a text in which one blank stands for any."""
    return " ".join(text.split())


@dataclass(frozen=True)
class ScoredRun:
    """A run of one benchmark: a score for every question.

    Attributes:
        benchmark: its name, as far as tools agree on one: ``mmlu``, ``gsm8k``.
        title: benchmark and protocol, for readers.
        model: who answered, for readers.
        place: folder or file that it was read from.
        tool: that made it.
        metric: which of the tool's figures the scores are.
        average: ``accuracy_micro`` or ``accuracy_macro``, as the benchmark publishes.
        outcomes: one per question.
        texts: of the questions, in the same order; empty where they are not at hand.
        run: where it is one of glmtune's.
        repeats: outcomes of the single runs, where it is the mean of several (seeds); else empty.
    """

    benchmark: str
    title: str
    model: str
    place: Path
    tool: str
    metric: str
    average: str
    outcomes: tuple[Outcome, ...]
    texts: tuple[QuestionText, ...] = ()
    run: Run | None = None
    repeats: tuple[tuple[Outcome, ...], ...] = ()


def scored(run: Run, data_dir: str | None, *, with_texts: bool) -> ScoredRun:
    """Return a run of glmtune as scores.

    Args:
        run: finished.
        data_dir: where texts of questions are looked for.
        with_texts: find the texts, to pair the run with one of another tool.

    Raises:
        DataError: the texts are wanted and the data are not at hand, or its benchmark is unknown.
    """
    groups = groups_of(run)
    averaged = set(groups.averaged(dict.fromkeys(row.answer.subject for row in run.rows)))
    rows = [row for row in run.rows if row.answer.subject in averaged]
    texts: tuple[QuestionText, ...] = ()
    if with_texts:
        samples = find_questions(run, data_dir)
        if not samples:
            raise DataError(
                "it is compared with a run of another tool, question by question of the same text, but the"
                " data of this run are not at hand. Name their folder with `benchmark.data_dir`.",
                path=run.folder,
            )
        texts = tuple(
            QuestionText(samples[row.answer.key].question, samples[row.answer.key].choices) for row in rows
        )
    title = str(run.results["title"]).removesuffix(f": {run.results.get('model')}")
    metric = "mean grade" if run.results.get("is_graded") else "accuracy"
    if run.is_sampled:
        metric = f"{metric}, mean of {run.results['num_answers']} answers"
    return ScoredRun(
        benchmark=str(run.results["benchmark"]),
        title=title,
        model=described(run.model),
        place=run.folder,
        tool="glmtune",
        metric=metric,
        average=groups.headline,
        outcomes=tuple(row.outcome for row in rows),
        texts=texts,
        run=run,
    )


def aligned(runs: Sequence[ScoredRun]) -> list[tuple[Outcome, ...]]:
    """Return the outcomes of several runs of one benchmark in the order of the first.

    Args:
        runs: at least two.

    Returns:
        One tuple per run; place i is the same question in all.

    Raises:
        ConfigError: two of them are the same run.
        DataError: they are not of the same questions, or glmtune asked them in other ways.
    """
    first = runs[0]
    found = [first.outcomes]
    for other in runs[1:]:
        if first.place.resolve() == other.place.resolve():
            raise ConfigError(f"`runs` names `{first.place}` twice. Name different ones.")
        if first.run is not None and other.run is not None:
            check_comparable(first.run, other.run, but=MAY_DIFFER)
            theirs = {(each.subject, each.index): each for each in other.outcomes}
            found.append(tuple(theirs[each.subject, each.index] for each in first.outcomes))
        else:
            found.append(_by_text(first, other))
    return found


def _by_text(first: ScoredRun, other: ScoredRun) -> tuple[Outcome, ...]:
    if (first.tool == OF_PROMPTS) != (other.tool == OF_PROMPTS):
        return _inside_prompts(first, other)
    with_choices = all(text.choices for text in (*first.texts, *other.texts))
    mine = _numbered(first.texts, with_choices=with_choices)
    theirs = dict(zip(_numbered(other.texts, with_choices=with_choices), other.outcomes, strict=True))
    missing = [place for place, key in enumerate(mine) if key not in theirs]
    num_more = len(theirs.keys() - set(mine))
    if missing or num_more:
        shown = f" (first: {' '.join(first.texts[missing[0]].text.split())[:60]!r})" if missing else ""
        raise DataError(
            f"its {len(mine):,} questions are not those of {other.place}, which has {len(theirs):,}:"
            f" {len(missing):,} are not there{shown}, and {num_more:,} there are not here. Evaluate both on"
            " the same split and the same number of questions.",
            path=first.place,
        )
    return tuple(theirs[key] for key in mine)


def _inside_prompts(first: ScoredRun, other: ScoredRun) -> tuple[Outcome, ...]:
    """Pair a run that has questions with one that has prompts, in which they stand."""
    asking, prompting = (other, first) if first.tool == OF_PROMPTS else (first, other)
    texts = [[without_blanks(text.text) for text in run.texts] for run in (asking, prompting)]
    places = find_in_prompts(*texts)
    lost = [number for number, place in enumerate(places) if place is None]
    if lost or len(places) != len(prompting.texts):
        shown = f" (first: {texts[0][lost[0]][:60]!r})" if lost else ""
        raise DataError(
            f"its {len(places):,} questions are not those in the prompts of {prompting.place}, of which there"
            f" are {len(prompting.texts):,}: {len(lost):,} are in none of them{shown}. Evaluate both on the"
            " same split and the same number of questions.",
            path=asking.place,
        )
    pairs = {number: place for number, place in enumerate(places) if place is not None}
    if asking is first:
        return tuple(other.outcomes[pairs[number]] for number in range(len(places)))
    back = {place: number for number, place in pairs.items()}
    return tuple(other.outcomes[back[place]] for place in range(len(places)))


def _numbered(texts: Sequence[QuestionText], *, with_choices: bool) -> list[tuple[str, int]]:
    """Return what each question is known by: its hash, and how many like it came before."""
    seen: Counter[str] = Counter()
    found: list[tuple[str, int]] = []
    for text in texts:
        digest = text.digest(with_choices=with_choices)
        found.append((digest, seen[digest]))
        seen[digest] += 1
    return found


def mean_of(runs: Sequence[ScoredRun]) -> ScoredRun:
    """Return the mean of runs of one benchmark that differ in their seed: question by question.

    Args:
        runs: at least two.

    Raises:
        ConfigError: two of them are the same run.
        DataError: they are not of the same questions.
    """
    first, rows = runs[0], aligned(runs)
    outcomes = tuple(
        dataclasses.replace(
            several[0],
            is_correct=all(each.is_correct for each in several),
            is_unparsed=all(each.is_unparsed for each in several),
            score=sum(each.value for each in several) / len(several),
        )
        for several in zip(*rows, strict=True)
    )
    return dataclasses.replace(
        first,
        model=f"{first.model}, and {len(runs) - 1} more",
        metric=f"mean of {len(runs)} runs",
        outcomes=outcomes,
        repeats=tuple(rows),
    )


def average_of(named: Sequence[Outcome], outcomes: Sequence[Outcome], average: str) -> float:
    """Return an average of outcomes by the subjects of others, whose names count.

    Args:
        named: outcomes of the same questions in the same order.
        outcomes: what is averaged.
        average: ``accuracy_micro`` or ``accuracy_macro``.
    """
    weights = (
        macro_weights([each.subject for each in named]) if average == MACRO else [1 / len(named)] * len(named)
    )
    return math.fsum(weight * each.value for weight, each in zip(weights, outcomes, strict=True))


def outcome_of(subject: str, index: int, score: float) -> Outcome:
    """Return the outcome of a question that another tool scored.

    Args:
        subject: its task or data set there.
        index: its number in it.
        score: from 0 to 1.
    """
    is_share = score not in (0.0, 1.0)
    return Outcome(subject, index, is_correct=score == 1.0, score=score if is_share else None)


def imported(
    benchmark: str,
    place: Path,
    tool: str,
    model: str,
    metric: str,
    rows: Sequence[tuple[Outcome, QuestionText]],
) -> ScoredRun:
    """Return a run of another tool: its averages are over questions.

    Args:
        benchmark: as tools call it.
        place: folder or file.
        tool: that made it.
        model: who answered, as far as that is known.
        metric: the figure that was taken.
        rows: outcome and text of every question.
    """
    outcomes = [outcome for outcome, _ in rows]
    # Where a score of one question is a share, all are scores: a mix would be read as right and wrong.
    if any(outcome.score is not None for outcome in outcomes):
        outcomes = [Outcome(each.subject, each.index, each.is_correct, score=each.value) for each in outcomes]
    return ScoredRun(
        benchmark=benchmark,
        title=f"{benchmark}, {tool} ({metric})",
        model=model,
        place=place,
        tool=tool,
        metric=metric,
        average=MICRO,
        outcomes=tuple(outcomes),
        texts=tuple(text for _, text in rows),
    )
