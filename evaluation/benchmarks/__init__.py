"""The benchmarks: their data layouts, prompts, extraction rules and averages."""

from evaluation.benchmarks.benchmark import Benchmark
from evaluation.benchmarks.tasks import BENCHMARKS, PUBLISHED, make_task

__all__ = ["BENCHMARKS", "PUBLISHED", "Benchmark", "make_task"]
