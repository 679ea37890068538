"""The benchmarks by name, and how a task is made from one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evaluation.benchmarks.bbh import BBH
from evaluation.benchmarks.benchmark import Ask, Benchmark, sample_set_rows
from evaluation.benchmarks.ceval import CEVAL
from evaluation.benchmarks.gsm8k import GSM8K, GSM8K_ZH, MGSM_ZH
from evaluation.benchmarks.hub import fetch_from_hub
from evaluation.benchmarks.mmlu import MMLU
from evaluation.benchmarks.sources import Wanted, find_folder
from evaluation.sample import Sample
from evaluation.settings import BenchmarkSettings
from evaluation.task import PreparedProtocol, Task
from glmtune.errors import ConfigError, unknown_name
from glmtune.settings import check_choice, check_range

BENCHMARKS: dict[str, Benchmark] = {
    "mmlu": MMLU,
    "ceval": CEVAL,
    "gsm8k": GSM8K,
    "bbh": BBH,
    "gsm8k_zh": GSM8K_ZH,
    "mgsm_zh": MGSM_ZH,
}
PUBLISHED = ("mmlu", "ceval", "gsm8k", "bbh")
SAMPLE_LICENCE = "Apache-2.0 (written for glmtune)"


def make_task(
    benchmark: str,
    *,
    protocol: str | None = None,
    split: str | None = None,
    data_dir: str | Path | None = None,
    is_chat: bool = True,
    num_fewshot: int | None = None,
    subjects: Sequence[str] | None = None,
    limit: int | None = None,
) -> Task:
    """Find the data of a benchmark and make the task that a protocol turns it into.

    Args:
        benchmark: a key of ``BENCHMARKS``.
        protocol: how to ask; None takes the one of the published GLM tables for this kind of model.
        split: None takes the one that GLM results are reported on.
        data_dir: folder with the official files (its own, or one with a folder per benchmark), ``hub`` to
            download them, or None: ``GLMTUNE_DATA``, then ``./data``, then the small set that ships.
        is_chat: whether the model is asked in conversations; base models continue plain text.
        num_fewshot: exemplars in a prompt; None takes the protocol's number.
        subjects: whose questions to ask; None asks all.
        limit: ask only the first so many questions of each subject.

    Returns:
        The task.

    Raises:
        ConfigError: an unknown name (valid ones listed, nearest first) or a number out of range.
        DataError: files are missing or malformed, or have another number of rows than the official ones.
    """
    if benchmark not in BENCHMARKS:
        raise ConfigError(unknown_name("`benchmark`", benchmark, BENCHMARKS))
    spec = BENCHMARKS[benchmark]
    protocol = protocol or (spec.chat_protocol if is_chat else spec.base_protocol)
    split = split or spec.splits[0]
    if protocol not in spec.protocols:
        raise ConfigError(unknown_name(f"`protocol` of {benchmark}", protocol, spec.protocols))
    check_choice("benchmark.split", split, spec.splits)
    if limit is not None:
        check_range("benchmark.limit", limit, low=1)
    # Names and numbers are checked above, before a folder is searched or anything is downloaded.
    folder = find_folder(Wanted(spec.name, spec.folder_names, spec.is_here, fetch_from_hub), data_dir)
    own_rows = sample_set_rows(folder, split)
    available = tuple(spec.subjects if own_rows is None else own_rows)
    asked = _chosen(available, subjects)
    samples = spec.load(folder, split, asked)
    prepared = spec.protocols[protocol](Ask(folder, asked, is_chat))
    return Task(
        benchmark=benchmark,
        title=spec.title,
        protocol=protocol,
        split=split,
        samples=tuple(_first(samples, limit)),
        prepared=_with_fewshot(prepared, num_fewshot, protocol),
        licence=spec.licence if own_rows is None else SAMPLE_LICENCE,
        source=str(folder),
        groups=spec.groups(split),
        # Asked of the rows, not of the split: C-Eval's test answers have been public since July 2025, older
        # files lack them.
        labelled=all(sample.answer for sample in samples),
        is_sample_set=own_rows is not None,
        is_partial=limit is not None or set(asked) != set(available),
    )


def task_of(asked: BenchmarkSettings, name: str, protocol: str | None, *, is_chat: bool) -> Task:
    """Make the task that settings ask for.

    Args:
        asked: which questions.
        name: of the benchmark, where the settings stand for several.
        protocol: None takes the published one.
        is_chat: whether the model is asked in conversations.

    Raises:
        ConfigError: see `make_task`; so is DataError.
    """
    return make_task(
        name,
        protocol=protocol,
        split=asked.split,
        data_dir=asked.data_dir,
        is_chat=is_chat,
        num_fewshot=asked.num_fewshot,
        subjects=asked.subjects,
        limit=asked.limit,
    )


def _chosen(available: tuple[str, ...], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Return the wanted subjects in the official order."""
    if wanted is None:
        return available
    if not wanted:
        raise ConfigError("`benchmark.subjects` is empty. Name subjects, or leave it out to ask all of them.")
    for subject in wanted:
        check_choice("benchmark.subjects", subject, available)
    return tuple(subject for subject in available if subject in wanted)


def _first(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    return [sample for sample in samples if limit is None or sample.index < limit]


def _with_fewshot(prepared: PreparedProtocol, num_fewshot: int | None, protocol: str) -> PreparedProtocol:
    if num_fewshot is None:
        return prepared
    if not 0 <= num_fewshot <= prepared.num_fewshot:
        raise ConfigError(
            f"`benchmark.num_fewshot` is {num_fewshot}, but `protocol={protocol}` has {prepared.num_fewshot}"
            f" exemplars here. Use 0 to {prepared.num_fewshot}, or another protocol."
        )
    return replace(prepared, num_fewshot=num_fewshot)
