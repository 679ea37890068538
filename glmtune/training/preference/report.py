"""What a preference run leaves in its results, on the terminal and in the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KEY = "preference"
"""In the results."""
FIGURES = ("margins", "accuracies")


def preference_results(entries: Sequence[Mapping[str, Any]], best_step: int | None) -> dict[str, Any]:
    """Sum up the evaluations of a preference run.

    Args:
        entries: lines of ``trainer_log.jsonl``, oldest first.
        best_step: of the best evaluation; None: there is none.

    Returns:
        Under ``preference`` margins and accuracies before the first step (``baseline``), at the last
        evaluation (``final``) and at the best, each with the ends of its 95 % interval; empty of other runs.
    """
    found = [entry for entry in entries if "eval_rewards/margins" in entry]
    if not found:
        return {}
    chosen: dict[str, Mapping[str, Any]] = {}
    if found[0]["step"] == 0:
        chosen["baseline"] = found[0]
    tuned = [entry for entry in found if entry["step"] > 0]
    if tuned:
        chosen["final"] = tuned[-1]
    if best := [entry for entry in tuned if entry["step"] == best_step]:
        chosen["best"] = best[-1]
    return {KEY: {name: _figures(entry) for name, entry in chosen.items()}}


def _figures(entry: Mapping[str, Any]) -> dict[str, Any]:
    values = {
        f"{name}{end}": entry[f"eval_rewards/{name}{end}"]
        for name in FIGURES
        for end in ("", "_low", "_high")
    }
    rest = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "nll")
    return {"step": entry["step"], **values, **{name: entry[f"eval_{name}"] for name in rest}}


def margin_words(values: Mapping[str, Any], prefix: str = "") -> str:
    """Say a margin with its interval.

    Args:
        values: with ``margins``, ``margins_low`` and ``margins_high``.
        prefix: in front of these names.

    >>> margin_words({"margins": 1.5, "margins_low": 1.25, "margins_high": 1.75})
    '1.500 (95 % 1.250 to 1.750)'
    """
    value, low, high = (values[f"{prefix}margins{end}"] for end in ("", "_low", "_high"))
    return f"{value:.3f} (95 % {low:.3f} to {high:.3f})"


def _accuracy_words(values: Mapping[str, Any]) -> str:
    value, low, high = (100 * values[f"accuracies{end}"] for end in ("", "_low", "_high"))
    return f"{value:.1f} % (95 % {low:.1f} to {high:.1f})"


def preference_words(results: Mapping[str, Any]) -> list[str]:
    """Return what the terminal says of it, line by line; nothing of other runs.

    Args:
        results: content of ``all_results.json``.
    """
    final = results.get(KEY, {}).get("final")
    if final is None:
        return []
    return [
        f"margin {margin_words(final)}, right in {_accuracy_words(final)} of the pairs (or judged answers)"
    ]


def preference_section(results: Mapping[str, Any]) -> str:
    """Return the model card's section; "" of other runs.

    Args:
        results: content of ``all_results.json``.
    """
    stages = results.get(KEY)
    if not stages:
        return ""
    names = {"baseline": "before tuning", "final": "last", "best": "best"}
    rows = "\n".join(
        f"| {names[stage]} (step {values['step']}) | {margin_words(values)} | {_accuracy_words(values)} "
        f"| {values['logps/chosen']:.2f} | {values['logps/rejected']:.2f} | {values['nll']:.4f} |"
        for stage, values in stages.items()
    )
    return f"""
## Preferences

| | margin of rewards | better one preferred | log p, better | log p, worse | nats per token, better |
|---|---|---|---|---|---|
{rows}

Rewards are beta times the log-ratio to the reference (of ORPO, which has none, beta times the mean
log-probability); log p is that of whole answers, in nats. Intervals are 95 % percentile bootstraps over the
validation pairs (or judged answers).
"""
