"""The tables of a result: averages, rules, subjects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluation.metrics import MACRO, MICRO, Score, interval
from evaluation.reporting.published import PublishedRow
from evaluation.reporting.results import Result
from evaluation.running.fingerprint import described
from glmtune.tables import TextTable

NOTHING = "–"
UNKNOWN = "unknown"
AVERAGES = {MICRO: "micro average", MACRO: "macro average"}


def percent(value: float | None) -> str:
    """Write a fraction as a percentage with two decimals.

    >>> percent(0.53566), percent(None)
    ('53.57', '–')
    """
    return NOTHING if value is None else f"{100 * value:.2f}"


def average_table(result: Result, published: PublishedRow | None) -> TextTable:
    """Lay out the averages: both of them, those of the benchmark, and the categories; published ones beside.

    Args:
        result: of a run.
        published: the published row of the same model, if there is one and the two may be compared.
    """
    summary, known = result.summary, result.task.labelled
    rows: list[tuple[str, Score]] = [
        (_readable(MICRO), summary.micro),
        (_readable(MACRO), summary.macro),
    ]
    if summary.headline != MICRO:
        rows.reverse()  # the published average stands first
    rows += list(summary.categories.items())
    rows += [(_readable(name), score) for name, score in summary.further.items()]
    columns = ("", "n", measure_name(result), "95 % interval", "unparsed", "truncated")
    cells = [
        (
            name,
            f"{score.num_samples:,}",
            percent(score.accuracy) if known else NOTHING,
            _interval(score) if known else NOTHING,
            f"{score.num_unparsed:,}",
            f"{score.num_truncated:,}",
        )
        for name, score in rows
    ]
    caption = _caption(result)
    if published is not None:
        columns = (*columns, "published")
        values = {_readable(published.average_name): published.average, **published.categories}
        cells = [(*row, _published(values.get(row[0]))) for row in cells]
        caption = "\n".join(filter(None, [caption, f"Published: {published.source} ({published.note})."]))
    return TextTable(result.title, columns, tuple(cells), caption)


def _published(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def rules_table(result: Result) -> TextTable:
    """Lay out the accuracy under every rule of extraction, from the same answers.

    Args:
        result: of a run.
    """
    known = result.task.labelled
    rows = tuple(
        (
            f"{name} (deciding)" if name == result.rule else name,
            percent(summary.micro.accuracy) if known else NOTHING,
            percent(summary.macro.accuracy) if known else NOTHING,
            f"{summary.micro.num_unparsed:,}",
            result.task.rules[name].about,
        )
        for name, summary in result.summaries.items()
    )
    columns = ("rule", "micro, %", "macro, %", "unparsed", "how it reads")
    return TextTable("Rules, same answers", columns, rows, text_columns=("how it reads",))


def subject_table(result: Result) -> TextTable:
    """Lay out every subject.

    Args:
        result: of a run.
    """
    known = result.task.labelled
    rows = tuple(
        (
            name,
            f"{score.num_samples:,}",
            percent(score.accuracy) if known else NOTHING,
            _interval(score) if known else NOTHING,
            f"{score.num_unparsed:,}",
            f"{score.num_truncated:,}",
        )
        for name, score in result.summary.subjects.items()
    )
    columns = ("subject", "n", measure_name(result), "95 % interval", "unparsed", "truncated")
    return TextTable("Subjects", columns, rows)


def run_table(result: Result) -> TextTable:
    """Lay out who answered, and by which command and software.

    Args:
        result: of a run.
    """
    fingerprint = result.fingerprint
    model, environment = fingerprint["model"], dict(result.environment)
    command = environment.pop("command", "")
    rows = [
        ("model", described(model)),
        ("weights", model["weights_hash"] or UNKNOWN),
        ("tuned", model["adapter"]),
        ("data type", model["dtype"] or UNKNOWN),
        ("computed by", model["engine"]),
        ("data, prompts", f"{fingerprint['data_hash'][:12]}, {fingerprint['prompt_hash'][:12]}"),
        ("answers up to", _answer_limit(fingerprint["decoding"])),
        *((name.replace("_", " "), str(value)) for name, value in environment.items() if value),
        *([("command", f"`{command}`")] if command else []),
    ]
    return TextTable("How it was run", ("", "value"), tuple(rows), text_columns=("value",))


def measure_name(result: Result) -> str:
    """Return what the averages are of, as a column is called."""
    return "mean grade, %" if result.is_graded else "accuracy, %"


def _answer_limit(decoding: Mapping[str, Any]) -> str:
    limit = decoding.get("max_new_tokens")
    return NOTHING if limit is None else f"{limit:,} tokens"


def _interval(score: Score) -> str:
    if score.stderr is None:
        return NOTHING
    low, high = interval(score)
    return f"{100 * low:.2f}–{100 * high:.2f}"


def _readable(name: str) -> str:
    return AVERAGES.get(name, name.removeprefix("accuracy_").replace("_", " "))


def _caption(result: Result) -> str:
    notes: list[str] = [result.failure_note] if result.failed else []
    if result.num_shortened:
        lost = "exemplars" if result.task.prepared.shorten is None else "the middle of their text"
        notes.append(f"{result.num_shortened:,} prompts lost {lost} to fit the model's context")
    if result.num_too_long:
        notes.append(
            f"{result.num_too_long:,} questions fit no context of the model: not asked, counted as unparsed"
        )
    if result.task.labelled and result.num_undecided:
        notes.append(undecided_note(result.num_undecided, len(result.judgements)))
    if result.num_thinking:
        notes.append(_thinking(result))
    if not result.task.labelled and result.task.benchmark == "ceval":
        notes.append("this split has no public answers: submission.json is what the server scores")
    elif not result.task.labelled:
        notes.append("the files have no answers to this split, so that nothing is scored")
    elif not result.is_comparable:
        notes.append("not comparable with published figures")
    return "; ".join(notes)


def undecided_note(num_undecided: int, num_answers: int) -> str:
    """Say how many answers are neither known to be right nor known to be wrong.

    Args:
        num_undecided: answers whose comparison came to no end.
        num_answers: all of them.
    """
    return (
        f"{num_undecided:,} of {num_answers:,} answers could not be compared with the right one in time or"
        " memory: unknown, counted as wrong (scored again, they are compared again)"
    )


def _thinking(result: Result) -> str:
    note = f"{result.num_thinking:,} answers hold thinking (<think>), which is not read as an answer"
    if not result.num_thinking_unended:
        return note
    limit = f"`benchmark.max_new_tokens` is {result.task.limits.max_new_tokens:,}"
    return f"{note}; {result.num_thinking_unended:,} of them hold nothing else ({limit})"
