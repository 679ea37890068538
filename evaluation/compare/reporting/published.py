"""The published cost of INT4, judged as it can be: without pairs."""

from __future__ import annotations

from dataclasses import dataclass

from evaluation.compare.statistics.intervals import paired_z, two_sided_p, unpaired_z
from evaluation.metrics import Score, binomial_stderr
from evaluation.reporting.published import published_tables

BASELINE = "chatglm2-6b"
CANDIDATE = "chatglm2-6b-int4"
EXAMPLE_DISCORDANT_FRAC = 0.15
"""Questions that one of two runs alone answers rightly: made up, for the pairs were not published."""
TITLES = {"mmlu": "MMLU", "ceval": "C-Eval"}


@dataclass(frozen=True, slots=True)
class PublishedDrop:
    """Two published averages of the same questions, whose pairs were not published.

    Attributes:
        title: benchmark and split.
        baseline: BF16.
        candidate: INT4.
        z: of the drop, as if from different questions.
        p_value: two-sided.
        z_if_paired: with pairs of which 15 % differ.
    """

    title: str
    baseline: Score
    candidate: Score
    z: float
    p_value: float
    z_if_paired: float

    def sentence(self) -> str:
        """Say what the published figures tell by themselves."""
        before, after = 100 * self.baseline.accuracy, 100 * self.candidate.accuracy
        sure = "significant" if self.p_value < 0.05 else "not significant"
        p_value = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.2f}"
        return (
            f"{self.title}: {before:.2f} → {after:.2f} on {self.baseline.num_samples:,} questions, z ="
            f" {self.z:.2f} ({p_value}, {sure})"
        )


def published_drops() -> list[PublishedDrop]:
    """Return what ChatGLM2-6B's table of quantization says, with the test that it allows."""
    found: list[PublishedDrop] = []
    for table in published_tables():
        rows, size = table["rows"], table.get("num_samples")
        if size is None or BASELINE not in rows or CANDIDATE not in rows:
            continue
        # A percentage is rounded to two decimals; the count of right answers behind it is a whole number.
        accuracies = [round(rows[name][0] / 100 * size) / size for name in (BASELINE, CANDIDATE)]
        before, after = (Score(value, size, binomial_stderr(value, size)) for value in accuracies)
        drop = before.accuracy - after.accuracy
        z, paired = unpaired_z(before, after), paired_z(drop, EXAMPLE_DISCORDANT_FRAC, size)
        assert z is not None, "published accuracies lie between 0 and 1"
        assert paired is not None
        title = f"{TITLES[table['benchmark']]} {table['split']}"
        found.append(PublishedDrop(title, before, after, z, two_sided_p(z), paired))
    return found


def why_pairs() -> str:
    """Say what the published averages tell without pairs, and would with them; docs/verdict.md says why."""
    drops = published_drops()
    listed = "; ".join(each.sentence() for each in drops)
    paired = " and ".join(f"{each.z_if_paired:.1f} ({each.title})" for each in drops)
    return (
        f"ChatGLM2-6B, BF16 → INT4, as if both had answered different questions: {listed}. With pairs of"
        f" which {100 * EXAMPLE_DISCORDANT_FRAC:.0f} % differ, the same drops would have z = {paired}: both"
        " were asked the same questions, and what is hard for both cancels out in a pair."
    )
