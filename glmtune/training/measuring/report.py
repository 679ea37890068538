"""What results, model card and terminal say of retention, from the log and the answers of the last step."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glmtune.training.log import BRANCHED
from glmtune.training.measuring.files import read_step, worst_rows
from glmtune.training.settings import METRICS

FIGURES = ("eval_retention", "eval_retention_kl", "eval_leak_rate", "eval_retention_switched_off")
"""The last one only where a switch was obeyed."""
NUM_WORST = 5
SHOWN_CHARS = 240
"""Of a prompt or an answer in the model card: a table's cell; the run folder has all of it."""
MARKUP = re.compile(r"([\\`*_\[\]<>#|~$&])")
"""What Markdown or HTML would take for markup: answers of a model may hold anything."""


def retention_results(
    run: Path, entries: Sequence[Mapping[str, Any]], *, metric: str, target: float | None
) -> dict[str, Any]:
    """Reduce what was measured to what ``all_results.json`` holds.

    Args:
        run: the run folder.
        entries: lines of the log, oldest first.
        metric: what chooses the best evaluation.
        target: among those that keep at least this share of answers; None: among all.

    Returns:
        ``final_...`` and ``best_...`` of the figures of an evaluation; ``retention_prompts``,
        ``retention_worst`` (prompt, both answers, KL and leak of the five worst), ``retention_seconds`` and
        ``run_seconds``; ``retention_target`` where no evaluation reached it: what was, and when. Empty where
        nothing was measured.
    """
    measured = [entry for entry in entries if "eval_retention" in entry]
    if not measured:
        return {}
    last = measured[-1]
    found: dict[str, Any] = {f"final_{name}": last[name] for name in FIGURES if name in last}
    key = f"eval_{metric}"
    judged = [entry for entry in measured if key in entry]
    allowed = [entry for entry in judged if target is None or entry["eval_retention"] >= target]
    if allowed:
        best = (max if METRICS[metric] else min)(allowed, key=lambda entry: entry[key])
        found |= {f"best_{name}": best[name] for name in FIGURES if name in best}
    elif judged:
        most = max(judged, key=lambda entry: entry["eval_retention"])
        found["retention_target"] = {
            "target": target,
            "highest": most["eval_retention"],
            "step": most["step"],
        }
    rows = read_step(run, last["step"])
    if rows is not None:
        found["retention_prompts"] = len(rows)
        names = ("prompt", "base", "tuned", "kl", "leaks")
        found["retention_worst"] = [
            {name: row[name] for name in names} for row in worst_rows(rows, NUM_WORST)
        ]
    retention, run_seconds = _seconds(entries)
    return {**found, "retention_seconds": round(retention, 1), "run_seconds": round(run_seconds, 1)}


def _seconds(entries: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return how long measuring retention took, and everything that the log tells of."""
    retention = sum(entry.get("eval_retention_runtime", 0.0) for entry in entries)
    total = retention + sum(entry.get("eval_runtime", 0.0) for entry in entries)
    # A run that goes on from another run's checkpoint begins at its step, and took no time for those before.
    before = next((entry["step"] for entry in entries if entry.get("alert") == BRANCHED), 0)
    for entry in entries:
        if "loss" in entry:
            total += entry.get("seconds_per_step", 0.0) * (entry["step"] - before)
            before = entry["step"]
    return retention, total


def retention_words(results: Mapping[str, Any]) -> list[str]:
    """Say in lines what is no mere figure: what no evaluation reached, what an exam showed, what it cost.

    Args:
        results: content of ``all_results.json``.
    """
    lines = _verdicts(results)
    if "retention_seconds" in results:
        lines.append(cost_words(results))
    return lines


def _verdicts(results: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if missed := results.get("retention_target"):
        lines.append(
            f"! no evaluation gave at least {missed['target']:.1%} of the base's answers "
            f"(`retention.target`): the most was {missed['highest']:.1%}, at step {missed['step']}. So there "
            "is no `best`, only `last`. More is kept by `retain=strict`, or by `+recipe=lora`."
        )
    if exam := results.get("retention_exam"):
        lines.append(exam_words(exam))
    return [line.replace("%", " %") for line in lines]


def cost_words(results: Mapping[str, Any]) -> str:
    """Say what measuring took.

    >>> cost_words({"retention_prompts": 200, "retention_seconds": 12.2, "run_seconds": 240.0})
    "retention: 200 prompts, 12 s of this run's 240 s"
    """
    prompts = f"{results['retention_prompts']} prompts, " if "retention_prompts" in results else ""
    spent, total = results["retention_seconds"], results["run_seconds"]
    return f"retention: {prompts}{spent:.0f} s of this run's {total:.0f} s"


def exam_words(exam: Mapping[str, Any]) -> str:
    """Say what an exam showed.

    >>> exam = {"benchmark": "exam", "kept": 0.96, "kept_low": 0.93, "kept_high": 0.98, "num_right": 214}
    >>> exam_words({**exam, "num_gained": 3, "num_questions": 300})
    'exam: kept 96% (93 to 98) of 214 answers that the base had right, 3 new ones right; 300 questions'
    """
    gained = f"{exam['num_gained']} new ones right; {exam['num_questions']} questions"
    if exam["kept"] is None:
        return f"{exam['benchmark']}: the base had none right, {gained}"
    low, high = 100 * exam["kept_low"], 100 * exam["kept_high"]
    return (
        f"{exam['benchmark']}: kept {exam['kept']:.0%} ({low:.0f} to {high:.0f}) of {exam['num_right']} "
        f"answers that the base had right, {gained}"
    )


def retention_section(results: Mapping[str, Any]) -> str:
    """Write the part of the model card about what is left of the base; empty where nothing was measured.

    Args:
        results: content of ``all_results.json``.
    """
    if "final_eval_retention" not in results:
        return ""
    prompts = results.get("retention_prompts", "some")
    text = (
        f"\n## What is left of the base\n\nAsked {prompts} general prompts at the end, the tuned model gave "
        f"{results['final_eval_retention']:.1%} of the base's own greedy answers, token by token; "
        f"{results['final_eval_leak_rate']:.1%} of its answers were others, in the style of the task. The "
        f"mean divergence from the base is {results['final_eval_retention_kl']:.3f} nats per token of the "
        "base's answers. `retention.png` shows the course, `retention/` holds every answer.\n"
    ).replace("%", " %")
    if (off := results.get("final_eval_retention_switched_off")) is not None:
        text += (
            f"\nThe switch left {off:.1%} of these prompts to the base, as it does in use; "
            "their answers are the base's by definition, and were not asked for.\n"
        ).replace("%", " %")
    for line in _verdicts(results):
        text += f"\n{line.removeprefix('! ')}\n"
    worst = results.get("retention_worst", ())
    if worst:
        text += "\nThe answers furthest from the base's:\n\n| prompt | base | tuned |\n|---|---|---|\n"
    for row in worst:
        text += f"| {' | '.join(_in_cell(row[name]) for name in ('prompt', 'base', 'tuned'))} |\n"
    return text


def _in_cell(text: str) -> str:
    """Show a text of any origin in a cell of a table as it is, cut where it is long."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    line = " ".join(shown.split())
    if len(line) > SHOWN_CHARS:
        line = f"{line[:SHOWN_CHARS]}…"
    return MARKUP.sub(r"\\\1", line)
