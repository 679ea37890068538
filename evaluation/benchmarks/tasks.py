"""The benchmarks by name, and how a task is made from one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from evaluation.benchmarks.bbh import BBH
from evaluation.benchmarks.benchmark import SAMPLE_SET_FILE, Ask, Benchmark, sample_set_rows
from evaluation.benchmarks.ceval import CEVAL, CEVAL_HARD
from evaluation.benchmarks.exam import EXAM
from evaluation.benchmarks.further.cmmlu import CMMLU
from evaluation.benchmarks.further.competition_math import MATH, MATH500
from evaluation.benchmarks.further.gsm_symbolic import GSM_SYMBOLIC
from evaluation.benchmarks.further.ifeval import IFEVAL
from evaluation.benchmarks.further.longbench import LONGBENCH
from evaluation.benchmarks.further.mmlu_pro import MMLU_PRO
from evaluation.benchmarks.gsm8k import GSM8K, GSM8K_ZH, MGSM_ZH
from evaluation.benchmarks.hub import fetch_from_hub
from evaluation.benchmarks.mmlu import MMLU
from evaluation.benchmarks.own.asking import OwnWords
from evaluation.benchmarks.own.benchmark import own_benchmark
from evaluation.benchmarks.own.description import is_description
from evaluation.benchmarks.sources import Wanted, find_folder
from evaluation.sample import Sample
from evaluation.settings import BenchmarkSettings
from evaluation.task import CHOICES, PreparedProtocol, Task
from glmtune.errors import ConfigError, DataError, unknown_name
from glmtune.settings import check_choice, check_range

BENCHMARKS: dict[str, Benchmark] = {
    "mmlu": MMLU,
    "ceval": CEVAL,
    "gsm8k": GSM8K,
    "bbh": BBH,
    "gsm8k_zh": GSM8K_ZH,
    "mgsm_zh": MGSM_ZH,
    "exam": EXAM,
    "ceval_hard": CEVAL_HARD,
    "cmmlu": CMMLU,
    "mmlu_pro": MMLU_PRO,
    "gsm_symbolic": GSM_SYMBOLIC,
    "math500": MATH500,
    "math": MATH,
    "ifeval": IFEVAL,
    "longbench": LONGBENCH,
}
PUBLISHED = ("mmlu", "ceval", "gsm8k", "bbh")
OWN_FILE = " A benchmark of your own is named by its file: `benchmark=my.yaml` (docs/own_benchmarks.md)."
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
    max_new_tokens: int | None = None,
    system: str | None = None,
    template: str | Path | None = None,
) -> Task:
    """Find the data of a benchmark and make the task that a protocol turns it into.

    Args:
        benchmark: a key of ``BENCHMARKS``, or the YAML file of one's own.
        protocol: how to ask; None takes the one of the published GLM tables for this kind of model.
        split: None takes the one that GLM results are reported on.
        data_dir: folder with the official files (its own, or one with a folder per benchmark), ``hub`` to
            download them, or None: ``GLMTUNE_DATA``, then ``./data``, then the small set that ships.
        is_chat: whether the model is asked in conversations; base models continue plain text.
        num_fewshot: exemplars in a prompt; None takes the protocol's number.
        subjects: whose questions to ask; None asks all.
        limit: ask only the first so many questions of each subject.
        max_new_tokens: tokens an answer may have; None takes the protocol's number.
        system: message of a user's own before every question; None: the protocol's, which has none.
        template: file with a user's own Jinja template of a question; None: as the protocol asks.

    Returns:
        The task.

    Raises:
        ConfigError: an unknown name (valid ones listed, nearest first), a number out of range, questions
            that are their own exemplars, or words of a user's own that would not be obeyed.
        DataError: files are missing or malformed, or have another number of rows than the official ones.
    """
    spec = _spec(benchmark, split, data_dir)
    protocol = protocol or (spec.chat_protocol if is_chat else spec.base_protocol)
    split = split or spec.splits[0]
    if protocol not in spec.protocols:
        raise ConfigError(unknown_name(f"`protocol` of {benchmark}", protocol, spec.protocols))
    check_choice("benchmark.split", split, spec.splits)
    if limit is not None:
        check_range("benchmark.limit", limit, low=1)
    # Names and numbers are checked above, before a folder is searched or anything is downloaded.
    folder = spec.home or _found_folder(spec, split, subjects, data_dir)
    own_rows = None if spec.home is not None else sample_set_rows(folder, split)
    available = tuple(spec.subjects if own_rows is None else own_rows)
    if spec.part_of:  # the files are the whole benchmark's
        available = tuple(subject for subject in available if subject in spec.subjects)
    own_subjects = () if spec.own_subjects is None else spec.own_subjects(folder, split)
    for subject in available:
        if subject not in (*spec.subjects, *own_subjects):
            raise DataError(
                unknown_name(f"A subject of {SAMPLE_SET_FILE}", subject, spec.subjects),
                path=folder / SAMPLE_SET_FILE,
            )
    asked = _chosen(available, tuple(name for name in own_subjects if name not in available), subjects)
    official = {*asked} & {*spec.subjects}
    samples = spec.load(folder, split, asked)
    prepared = _with_fewshot(spec.protocols[protocol](Ask(folder, asked, is_chat)), num_fewshot, protocol)
    if max_new_tokens is not None:
        prepared = _with_max_new_tokens(prepared, max_new_tokens, protocol)
    own = tuple(subject for subject in asked if subject not in spec.subjects)
    _refuse_fewer_exemplars(prepared, own)
    chosen = _first(samples, limit)
    _refuse_own_exemplars(spec, split, prepared, chosen)
    own_words = OwnWords(system, None if template is None else Path(template).expanduser())
    if own_words.is_given:
        if spec.home is not None:
            own_words.refuse_for(benchmark)
        prepared = own_words.applied_to(prepared, is_chat=is_chat, protocol=protocol)
    return Task(
        benchmark=spec.name,
        title=spec.title,
        protocol=protocol,
        split=split,
        samples=tuple(chosen),
        prepared=prepared,
        licence=spec.licence if own_rows is None else SAMPLE_LICENCE,
        source=str(folder),
        groups=spec.groups(split),
        # Asked of the rows, not of the split: C-Eval's test answers have been public since July 2025, older
        # files lack them.
        labelled=all(sample.answer for sample in samples),
        is_sample_set=own_rows is not None,
        is_partial=limit is not None or (bool(official) and not {*available} <= {*asked}),
        own_subjects=own,
        file=benchmark if spec.home is not None else "",
        own_prompt=own_words.told(),
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
        max_new_tokens=asked.max_new_tokens,
        system=asked.system,
        template=asked.template,
    )


def _spec(benchmark: str, split: str | None, data_dir: str | Path | None) -> Benchmark:
    """Return a benchmark by its name, or that of a user's file.

    Raises:
        ConfigError: there is none of that name, or a file of one's own is to be looked for elsewhere.
    """
    if not is_description(benchmark):
        if benchmark not in BENCHMARKS:
            raise ConfigError(unknown_name("`benchmark`", benchmark, BENCHMARKS) + OWN_FILE)
        return BENCHMARKS[benchmark]
    path = Path(benchmark).expanduser()
    if data_dir is not None:
        raise ConfigError(
            f"`benchmark.data_dir` is `{data_dir}`, but {path} names its files itself (`files`). Leave it"
            " out."
        )
    if path.stem in BENCHMARKS:
        raise ConfigError(
            f"`benchmark` is `{path}`, but `{path.stem}` is one that ships. Name the file otherwise."
        )
    return own_benchmark(path, split)


def _found_folder(
    spec: Benchmark, split: str, subjects: Sequence[str] | None, data_dir: str | Path | None
) -> Path:
    own_files = partial(_has_own_subjects, spec, split, tuple(subjects or ()))
    wanted = Wanted(
        spec.part_of or spec.name,
        spec.folder_names,
        lambda place: spec.is_here(place) or own_files(place),
        fetch_from_hub,
    )
    return find_folder(wanted, data_dir)


def _has_own_subjects(spec: Benchmark, split: str, subjects: tuple[str, ...], folder: Path) -> bool:
    """Say whether a folder holds a subject of the user's own that was asked for by name."""
    found = () if spec.own_subjects is None else spec.own_subjects(folder, split)
    return any(subject in found for subject in subjects)


def _chosen(
    available: tuple[str, ...], own: tuple[str, ...], wanted: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the wanted subjects in the official order, own ones last; those are asked only by name."""
    if wanted is None:
        return available
    if not wanted:
        raise ConfigError("`benchmark.subjects` is empty. Name subjects, or leave it out to ask all of them.")
    for subject in wanted:
        check_choice("benchmark.subjects", subject, (*available, *own))
    return tuple(subject for subject in (*available, *own) if subject in wanted)


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


def _refuse_fewer_exemplars(prepared: PreparedProtocol, own: tuple[str, ...]) -> None:
    """Refuse own subjects whose few exemplars would take some from the official ones beside them."""
    exemplars = {} if prepared.few_shot is None else prepared.few_shot.exemplars
    most = max((len(exemplars[subject]) for subject in exemplars if subject not in own), default=0)
    for subject in own:
        if subject in exemplars and len(exemplars[subject]) == prepared.num_fewshot < most:
            raise ConfigError(
                f"`benchmark.subjects` names `{subject}`, which has {len(exemplars[subject])} exemplars,"
                f" beside official subjects with {most}. Give it as many, or ask it by itself."
            )


def _with_max_new_tokens(prepared: PreparedProtocol, max_new_tokens: int, protocol: str) -> PreparedProtocol:
    check_range("benchmark.max_new_tokens", max_new_tokens, low=1)
    if prepared.kind == CHOICES:
        raise ConfigError(
            f"`benchmark.max_new_tokens` is {max_new_tokens}, but `protocol={protocol}` compares"
            " probabilities and generates nothing. Leave it out, or use a protocol that generates, such as"
            " `protocol=zero_shot_cot`."
        )
    limits = replace(prepared.limits, max_new_tokens=max_new_tokens)
    return replace(prepared, limits=limits, max_new_tokens_of=None)


def _refuse_own_exemplars(
    spec: Benchmark, split: str, prepared: PreparedProtocol, samples: Sequence[Sample]
) -> None:
    """Refuse to ask a question whose answer stands above it: its accuracy would say nothing."""
    few_shot = prepared.few_shot
    if few_shot is None or not prepared.num_fewshot:
        return
    own = [
        sample
        for sample in samples
        if few_shot.shows_own(sample, prepared.num_fewshot)
        and (split, *sample.key) not in spec.published_repeats
    ]
    if not own:
        return
    zero_shot = [name for name in spec.protocols if name.startswith("zero_shot")]
    ways_out = [
        *(f"`protocol={name}`" for name in zero_shot),
        "`benchmark.num_fewshot=0`",
        *(f"`benchmark.split={name}`" for name in spec.splits if name not in (split, "dev", "validation")),
    ]
    raise ConfigError(
        f"`benchmark.split` is `{split}`, but {len(own):,} of its {len(samples):,} questions stand among"
        f" their own {prepared.num_fewshot} exemplars, answer included (first: `{own[0].subject}`"
        f" {own[0].index}), so the accuracy would say nothing. Use {', or '.join(ways_out)}; or take them"
        " out of one of the files."
    )
