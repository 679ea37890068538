"""Show a data report on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from glmtune.data.check import DataReport, LengthStats, SplitReport
from glmtune.tables import named_values

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
        console.print(f"[bold]{split}[/bold]: the same file as {earlier}\n")
    for overlap in report.overlaps:
        line = (
            f"[bold]train ∩ {overlap.split}[/bold]: {overlap.num_same_prompt} of {overlap.num_rows} prompts"
            f" and {overlap.num_same_row} whole rows of {overlap.split} occur in train"
        )
        console.print(line if not overlap.num_same_prompt else f"[yellow]{line}[/yellow]", highlight=False)
    _show_advice(report, console)
    _show_sample(report, console)


def _share(count: int, total: int) -> str:
    return f"{count} ({100 * count / max(1, total):.1f} %)"


def _show_split(split: SplitReport, console: Console) -> None:
    encoding = f", {split.encoding}" if split.encoding else ""
    unused = f"; not read: {', '.join(split.unused_columns)}" if split.unused_columns else ""
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
            ("bad rows", Text(bad, style="red") if split.num_bad_rows else "none"),
            ("duplicates", f"{duplicates}, {_share(split.num_duplicate_prompts, split.num_rows)} prompts"),
            ("prompt tokens", _stats_line(split.prompt_tokens)),
            ("answer tokens", _stats_line(split.answer_tokens)),
            ("truncated", _truncation_line(split)),
            ("loss", loss),
        ]
    )
    console.print(Text(split.split, style="bold underline"))
    console.print(table, highlight=False)
    for row in split.bad_rows:
        console.print(Text(f"  line {row.line}: {row.problem}", style="red"))
    _show_histogram(split, console)


def _stats_line(stats: LengthStats) -> str:
    return (
        f"mean {stats.mean:.1f}, median {stats.median}, 90 % ≤ {stats.p90}, 95 % ≤ {stats.p95},"
        f" 99 % ≤ {stats.p99}, longest {stats.max}"
    )


def _truncation_line(split: SplitReport) -> str:
    counts = split.truncation
    total = split.num_training_rows
    parts = [
        f"{_share(rows, total)} {what}"
        for rows, what in (
            (counts.rows_with_dropped_turns, f"lose old turns ({counts.dropped_turns} turns)"),
            (counts.rows_with_cut_question, f"lose the question's end ({counts.cut_question_tokens} tokens)"),
            (counts.rows_with_cut_answer, f"lose the answer's end ({counts.cut_answer_tokens} tokens)"),
        )
        if rows
    ]
    return "rows: " + ", ".join(parts) if parts else "no rows"


def _show_histogram(split: SplitReport, console: Console) -> None:
    most = max(count for _, _, count in split.histogram)
    console.print("\n  tokens per row, prompt and answer, before truncation")
    for low, high, count in split.histogram:
        filled = round(_BAR_WIDTH * count / most)
        bar = "█" * filled if filled or not count else "▏"
        console.print(f"  {low:>6} – {high:<6} {bar} {count}", highlight=False)
    console.print()


def _show_advice(report: DataReport, console: Console) -> None:
    pairs = (
        ("prompts", "max_source_length", report.max_source_length, report.wanted_source_length),
        ("answers", "max_target_length", report.max_target_length, report.wanted_target_length),
    )
    for what, name, have, want in pairs:
        if have < want:
            advice = f"data.{name}={want} would leave 99 % of the {what} whole; now it is {have}"
            console.print(f"[yellow]{advice}[/yellow]", highlight=False)
        else:
            spare = f" ({want} would do)" if want < have else ""
            console.print(f"data.{name}={have} leaves 99 % of the {what} whole{spare}", highlight=False)


def _show_sample(report: DataReport, console: Console) -> None:
    split = report.splits[0]
    learnt = sum(part.num_tokens for part in report.sample if part.has_loss)
    total = sum(part.num_tokens for part in report.sample)
    console.print(
        f"\n[bold]{split.split} sample[/bold], line {report.sample_line}, template {report.template}:"
        f" [{_LOSS_STYLE}]⟦loss⟧[/{_LOSS_STYLE}] on {learnt} of {total} tokens",
        highlight=False,
    )
    text = Text()
    for part in report.sample:
        if part.has_loss:
            text.append(f"⟦{part.text}⟧", style=_LOSS_STYLE)
        else:
            text.append(part.text, style="dim")
    console.print(text)
