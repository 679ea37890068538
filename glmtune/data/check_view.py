"""Show a data report on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from glmtune.data.check import DataReport, LengthStats, SamplePart, SplitReport
from glmtune.data.reading.json_values import listed
from glmtune.tables import named_values
from glmtune.terminal.console import Console, plain

_BAR_WIDTH = 40
_LOSS_STYLE = "bold green"


def show_report(report: DataReport, console: Console) -> None:
    """Print a report.

    Args:
        report: from `check_data`.
        console: where to; without colours the loss-carrying part is still marked by brackets.
    """
    for split in report.splits:
        _show_split(split, console)
    for split, earlier in report.same_file:
        console.print(Text.assemble((split, "bold"), f": the same file as {earlier}\n"))
    for overlap in report.overlaps:
        line = Text.assemble(
            (f"train ∩ {overlap.split}", "bold"),
            f": {overlap.num_same_prompt} of {overlap.num_rows} prompts and {overlap.num_same_row} whole rows"
            f" of {overlap.split} occur in train",
            style="yellow" if overlap.num_same_prompt else "",
        )
        console.print(line)
    _show_advice(report, console)
    _show_sample(report, console)


def _share(count: int, total: int) -> str:
    return f"{count} ({100 * count / max(1, total):.1f} %)"


def _show_split(split: SplitReport, console: Console) -> None:
    encoding = f", {split.encoding}" if split.encoding else ""
    unused = f"; not read: {listed(split.unused_columns)}" if split.unused_columns else ""
    rows = f"{split.num_rows}"
    if split.num_multi_turn:
        rows += f", {_share(split.num_multi_turn, split.num_rows)} with several turns"
    if split.num_training_rows != split.num_rows:
        rows += f", giving {split.num_training_rows} training rows"
    bad = f"{split.num_bad_rows}, of them {split.num_empty_answers} with an empty answer"
    duplicates = f"{_share(split.num_duplicates, split.num_rows)} whole rows"
    loss = f"on {100 * split.loss_frac:.1f} % of {split.num_tokens} tokens (after truncation)"
    table = named_values(
        [
            ("file", f"{split.path} ({split.kind}{encoding})"),
            ("layout", f"{split.layout} ({', '.join(split.columns)}){unused}"),
            ("rows", rows),
            *_epoch_row(split),
            ("bad rows", plain(bad, "red") if split.num_bad_rows else "none"),
            ("duplicates", f"{duplicates}, {_share(split.num_duplicate_prompts, split.num_rows)} prompts"),
            ("prompt tokens", _stats_line(split.prompt_tokens)),
            ("answer tokens", _stats_line(split.answer_tokens)),
            *_judged_rows(split),
            ("truncated", split.truncation.words(split.num_training_rows) or "no rows"),
            ("loss", loss),
        ]
    )
    title = f"{split.split}: {split.mix_name}" if split.mix_name else split.split
    console.print(Text(title, style="bold underline"))
    console.print(table, highlight=False)
    for row in split.bad_rows:
        console.print(plain(f"  line {row.line}: {row.problem}", "red"))
    _show_histogram(split, console)


def _judged_rows(split: SplitReport) -> list[tuple[str, str]]:
    """Say what is compared in rows with two answers, or a judged one."""
    judged = split.judged
    if judged is None:
        return []
    sides = (("better ones", judged.desirable_tokens), ("worse ones", judged.undesirable_tokens))
    if judged.num_pairs:
        said = (
            f"{judged.num_pairs}; in {_share(judged.num_longer, judged.num_pairs)} the better one is longer"
        )
    else:
        said = f"{judged.num_desirable} answers are desirable, {judged.num_undesirable} are not"
    found = [(name, _stats_line(stats)) for name, stats in sides if stats is not None]
    return [("pairs" if judged.num_pairs else "judged", said), *found]


def _epoch_row(split: SplitReport) -> list[tuple[str, str]]:
    """Say how much of an epoch a set of a mixture is."""
    count = split.rows_per_epoch
    if count is None:
        return []
    return [("in an epoch", f"{count} rows, each {count / max(1, split.num_training_rows):.3g} times")]


def _stats_line(stats: LengthStats) -> str:
    return (
        f"mean {stats.mean:.1f}, median {stats.median}, 90 % ≤ {stats.p90}, 95 % ≤ {stats.p95},"
        f" 99 % ≤ {stats.p99}, longest {stats.max}"
    )


def _show_histogram(split: SplitReport, console: Console) -> None:
    most = max(count for _, _, count in split.histogram)
    console.print("\n  tokens per row, prompt and answer, before truncation")
    for low, high, count in split.histogram:
        filled = round(_BAR_WIDTH * count / most)
        # Few rows among many round to no bar at all, and would look like none.
        bar = "█" * filled if filled or not count else "▏"
        console.print(f"  {low:>6} – {high:<6} {bar} {count}", highlight=False)
    console.print()


def _show_advice(report: DataReport, console: Console) -> None:
    pairs = (
        ("prompts", "max_source_length", report.max_source_length, report.wanted_source_length),
        ("answers", "max_target_length", report.max_target_length, report.wanted_target_length),
    )
    if report.chosen_lengths:
        console.print(f"{report.chosen_lengths} of training", highlight=False)
    for what, name, have, want in pairs:
        if have < want:
            advice = f"data.{name}={want} would leave 99 % of the {what} whole; now it is {have}"
            console.print(plain(advice, "yellow"))
        else:
            spare = f" ({want} would do)" if want < have else ""
            console.print(f"data.{name}={have} leaves 99 % of the {what} whole{spare}", highlight=False)


def _show_sample(report: DataReport, console: Console) -> None:
    split = report.splits[0]
    learnt = sum(part.num_tokens for part in report.sample if part.has_loss)
    total = sum(part.num_tokens for part in report.sample)
    console.print(
        Text.assemble(
            (f"\n{split.split} sample", "bold"),
            f", line {report.sample_line}, template {report.template}: ",
            ("⟦loss⟧", _LOSS_STYLE),
            f" on {learnt} of {total} tokens",
        )
    )
    console.print(_sample_text(report.sample))
    if report.rejected_sample:
        console.print(Text("\nand its worse answer:", style="bold"))
        console.print(_sample_text(report.rejected_sample))


def _sample_text(parts: Sequence[SamplePart]) -> Text:
    text = Text()
    for part in parts:
        if part.has_loss:
            text.append(plain(f"⟦{part.text}⟧", _LOSS_STYLE))
        else:
            text.append(plain(part.text, "dim"))
    return text
