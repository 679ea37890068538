"""Runs pytest on files: on a GPU the tests marked `gpu`, in a dry run the same bodies on the CPU."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import pytest

from benchmarks.gpu.worker import Figures, parse_words

ALL_OF_THEM_SKIPPED = 5
"""Exit code of pytest where no test was collected; ours where none ran."""


class Counting:
    """Counts as pytest goes, so that a part that is stopped leaves what it has."""

    def __init__(self, figures: Figures) -> None:
        """Begin with nothing."""
        self.figures = figures
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[str] = []
        self.reasons: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take one phase of a test: pytest's hook."""
        if report.when != "call" and report.outcome == "passed":
            return
        self.counts[report.outcome] += 1
        if report.outcome == "failed":
            self.failures.append(report.nodeid)
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.figures.keep(**self.counts, failures=self.failures, skip_reasons=self.reasons)


def main() -> int:
    """Run the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    options = parse_words(parser)
    counting = Counting(Figures(options.out))
    marks = "gpu and not slow" if options.device == "cuda" else "not gpu and not slow"
    words = [*options.files, "-m", marks, "-q", "--tb=short", "--disable-warnings", "-p", "no:cacheprovider"]
    code = int(pytest.main(words, plugins=[counting]))
    return code or (0 if counting.counts["passed"] else ALL_OF_THEM_SKIPPED)


if __name__ == "__main__":
    sys.exit(main())
