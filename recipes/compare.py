"""Decide what a quantized or tuned model loses, on paired questions: `glmtune compare`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.compare.settings import (
    HEADLINE,
    NOT_QUANTIZED,
    PRECISIONS,
    GateSettings,
    ImportSettings,
    SideSettings,
)
from evaluation.compare.statistics.gate import EXIT_CODES
from evaluation.settings import ALL, BenchmarkSettings
from evaluation.statistics.clustered import CLUSTER, SUBJECT
from glmtune.errors import ConfigError, unknown_name
from glmtune.inference.settings import DraftSettings, EngineSettings
from glmtune.models.settings import ModelSettings
from glmtune.settings import check_choice, check_range, setting
from recipes.words.compose import Command

if TYPE_CHECKING:
    from evaluation.compare.build import Side
    from evaluation.compare.reporting.tables import ComparisonReport
    from evaluation.compare.several import Sides
    from glmtune.terminal.console import Console


@dataclass(frozen=True)
class CompareConfig:
    """Whom to compare, on what, and what may be lost."""

    runs: list[str] | None = setting(
        None,
        "finished runs: [BASELINE,CANDIDATE] has a verdict, [A,B,C,...] is a table of each against each;"
        " folders of `glmtune eval` (A+B: the mean of seeds), samples of lm-evaluation-harness, folders of"
        " OpenCompass",
    )
    imported: ImportSettings = setting(ImportSettings, "with runs of other tools: what counts of them")
    cluster: str | None = setting(
        None,
        "with a table of runs: questions that hang together, by `subject` or by the `cluster` that a"
        " benchmark names; default: every question for itself",
    )
    baseline: SideSettings = setting(SideSettings, "the model that a drop is counted from")
    candidate: SideSettings = setting(SideSettings, "the model that is judged")
    candidates: list[str] | None = setting(
        None,
        "rank ways to quantize in one table instead, such as [int8,int4,int4-a8,int4-e8] (-a8: inputs,"
        " -e8: embedding and head in INT8)",
    )
    benchmark: BenchmarkSettings = setting(BenchmarkSettings, "the questions; ceval,mmlu names several")
    benchmarks: list[str] | None = setting(None, "several benchmarks; benchmark=ceval,mmlu is the same")
    gate: GateSettings = setting(GateSettings, "what a candidate may lose")
    text_file: str | None = setting(None, "also compare the perplexity on this text (UTF-8)")
    text_window_tokens: int = setting(512, "tokens of the text that are read at once")
    model: ModelSettings = setting(ModelSettings, "the model that both sides share, where they do not differ")
    engine: EngineSettings = setting(EngineSettings, "how much is computed at once")
    draft: DraftSettings = setting(DraftSettings, "a smaller model that drafts tokens for either side")
    protocol: str | None = setting(None, "as in `glmtune eval`, for all benchmarks")
    is_chat: bool | None = setting(
        None, "ask in conversations (true) or as plain text (false); default: by the baseline's name"
    )
    output_dir: str | None = setting(None, "folder of the report; default: under runs/compare")
    paper: bool = setting(False, "also write tables as LaTeX (tables.tex) and figures as SVG and PDF")
    resume: bool = setting(True, "use answers that exist; false asks all questions anew")
    num_threads: int | None = setting(None, "threads of the CPU; default: as PyTorch chooses")
    wait_seconds: float = setting(1800.0, "with several processes: without a sign of the others, give up")

    def __post_init__(self) -> None:
        """Check what needs no file.

        Raises:
            ConfigError: a value is not allowed, or settings contradict each other.
        """
        check_range("text_window_tokens", self.text_window_tokens, low=1)
        check_range("wait_seconds", self.wait_seconds, low=0)
        if self.num_threads is not None:
            check_range("num_threads", self.num_threads, low=1)
        if self.cluster is not None:
            check_choice("cluster", self.cluster, (SUBJECT, CLUSTER))
        if self.runs is not None:
            self._check_runs(self.runs)
            return
        for name, usual in {"imported": ImportSettings(), "cluster": None}.items():
            if getattr(self, name) != usual:
                raise ConfigError(
                    f"`{name}` is given, but it is of a table of finished `runs`, and none are named. Leave"
                    " it out; the report of two models has errors by clusters anyway."
                )
        if self.candidates is not None and not self.candidates:
            raise ConfigError("`candidates` is empty. Name ways to quantize, such as [int8,int4].")
        if self.candidates is not None and self.candidate.quantization is not None:
            raise ConfigError(
                f"`candidate.quantization` is `{self.candidate.quantization}` beside `candidates`, which name"
                " it for each. Leave one out."
            )
        self._check_benchmarks()

    def _check_runs(self, runs: list[str]) -> None:
        if len(runs) < 2:
            raise ConfigError(
                f"`runs` names {len(runs)} folder, but it must name two, [BASELINE,CANDIDATE], or more. For a"
                " table of several quantizations use `candidates`."
            )
        unused: dict[str, object] = {
            **dict.fromkeys(("candidates", "benchmarks", "text_file", "protocol", "is_chat", "num_threads")),
            **dict.fromkeys(("baseline", "candidate"), SideSettings()),
            "model": ModelSettings(),
            "engine": EngineSettings(),
            "draft": DraftSettings(),
            "benchmark": BenchmarkSettings(data_dir=self.benchmark.data_dir),
            "resume": True,
        }
        for name, default in unused.items():
            if getattr(self, name) != default:
                raise ConfigError(
                    f"`{name}` is set beside `runs`, which are finished: no model is asked, so it would be"
                    " ignored. Leave one of them out."
                )

    def _check_benchmarks(self) -> None:
        several = self.names()
        if len(several) < 2:
            return
        for name in ("split", "subjects", "num_fewshot"):
            if (value := getattr(self.benchmark, name)) is not None:
                raise ConfigError(
                    f"`benchmark.{name}` is {value}, but {', '.join(several)} differ in it. Leave it out, or"
                    " name one benchmark."
                )

    def names(self) -> list[str]:
        """Return the benchmarks asked, each once."""
        if self.benchmarks is not None:
            return list(dict.fromkeys(self.benchmarks))
        if self.benchmark.name != ALL:
            return [self.benchmark.name]
        from evaluation.benchmarks.tasks import PUBLISHED

        return list(PUBLISHED)

    def candidate_sides(self) -> dict[str, SideSettings]:
        """Return what each candidate differs in, by its name in a table."""
        if self.candidates is None:
            return {"candidate": self.candidate}
        return {name: dataclasses.replace(self.candidate, quantization=name) for name in self.candidates}


def run(config: CompareConfig) -> int:
    """Evaluate what is not evaluated yet (one model in memory at a time), compare, report.

    Args:
        config: all settings.

    Returns:
        The exit code: 0 within tolerance, 3 exceeds it, 4 not enough questions to tell; a table of methods
        has that of its worst candidate. Processes other than the first return 0.

    Raises:
        GlmtuneError: a setting, the data, a model or a run cannot be used; what is answered is kept.
    """
    from evaluation.compare.build import Side, build_report, default_comparison_folder, deliver
    from evaluation.compare.reporting.report import is_comparison
    from evaluation.compare.several import plain_pair, read_sides
    from glmtune.storage.journal import refuse_foreign_folder
    from glmtune.storage.lock import lock_folder
    from glmtune.terminal.console import Console

    console = Console()
    data_dir = config.benchmark.data_dir
    folder = Path(config.output_dir).expanduser() if config.output_dir else None
    if folder is not None:  # before hours are spent on answers
        refuse_foreign_folder(folder, is_comparison, result="comparison")
    if config.runs is not None:
        found = read_sides(config.runs, config.imported, data_dir)
        pair = plain_pair(found)
        if pair is None:
            return _compare_each(config, config.runs, found, folder, console)
        _refuse_table_settings(config)
        before, after = map(Side, pair)
        sides = {"candidate": after}
    else:
        before, sides = _evaluate(config, console)
        if not before.runs:
            return 0
    folder = folder or default_comparison_folder(before, list(sides.values()))
    reports = {
        name: build_report(before, side, config.gate, text_file=config.text_file)
        for name, side in sides.items()
    }
    with lock_folder(folder):
        for name, report in reports.items():
            place = folder if config.candidates is None else folder / name
            deliver(report, config.gate, place, console, data_dir=data_dir, paper=config.paper)
        if config.candidates is None:
            return EXIT_CODES[reports["candidate"].outcome]
        return _rank(before, sides, reports, folder, console, paper=config.paper)


def _refuse_table_settings(config: CompareConfig) -> None:
    if config.cluster is not None:
        raise ConfigError(
            f"`cluster` is `{config.cluster}`, but the report of two runs has errors by every cluster there"
            " is beside the verdict, which is of single questions. Leave it out, or name more `runs`."
        )


def _compare_each(
    config: CompareConfig, names: list[str], sides: Sides, folder: Path | None, console: Console
) -> int:
    """Write the table of several runs; it has no baseline, and so no verdict: the exit code is 0."""
    from evaluation.compare.reporting.matrix import show_matrix, write_matrix
    from evaluation.compare.several import compare_each, default_table_folder
    from glmtune.storage.lock import lock_folder

    usual = GateSettings(confidence=config.gate.confidence, average=config.gate.average)
    if config.gate != usual:
        raise ConfigError(
            "`gate` sets a tolerance or draws, but a table of several runs, of other tools or of several"
            " answers has no baseline and no verdict: only `gate.confidence` and `gate.average` count there."
            " Leave the others out, or compare two runs."
        )
    average = None if config.gate.average == HEADLINE else f"accuracy_{config.gate.average}"
    confidence = config.gate.confidence
    matrix = compare_each(sides, names, confidence=confidence, average=average, cluster=config.cluster)
    folder = folder or default_table_folder(sides, names)
    with lock_folder(folder):
        written = write_matrix(matrix, folder, paper=config.paper)
    show_matrix(matrix, console)
    shown = ", ".join(path.name for path in written)
    console.print(f"Written: {folder} ({shown})", markup=False, highlight=False, soft_wrap=True)
    return 0


def _rank(
    before: Side,
    sides: Mapping[str, Side],
    reports: Mapping[str, ComparisonReport],
    folder: Path,
    console: Console,
    *,
    paper: bool,
) -> int:
    from evaluation.compare.reporting.methods import (
        MethodResult,
        cost_of,
        method_table,
        rank_methods,
        write_methods,
    )

    costs = {name: cost_of(list(side.runs.values()), side.weight_bytes or 0) for name, side in sides.items()}
    methods = [MethodResult(name, costs[name], report) for name, report in reports.items()]
    first = next(iter(reports.values()))
    table = rank_methods(
        first.labels[0], cost_of(list(before.runs.values()), before.weight_bytes or 0), methods
    )
    method_table(table).show(console)
    title = first.title.replace(f"→ {first.labels[1]}", "and candidates")
    written = write_methods(table, title, folder, paper=paper)
    console.print(f"Written: {', '.join(map(str, written))}", markup=False, highlight=False, soft_wrap=True)
    return EXIT_CODES[table.outcome]


def _evaluate(config: CompareConfig, console: Console) -> tuple[Side, dict[str, Side]]:
    """Answer all benchmarks with the baseline, then with each candidate."""
    from evaluation.compare.statistics.perplexity import read_text

    # Whatever can be wrong with a name is found before hours are spent on the baseline.
    text = None if config.text_file is None else read_text(config.text_file)
    shared = config.baseline.applied_to(config.model)
    models = {name: side.applied_to(config.model) for name, side in config.candidate_sides().items()}
    # A baseline with a type of its own (`baseline.quantization=bf16`) decides the type of what a candidate
    # does not quantize, too: else a drop would be that of two changes at once.
    if config.baseline.dtype is not None or config.baseline.quantization in PRECISIONS:
        models = {
            name: model
            if model.dtype != config.model.dtype
            else dataclasses.replace(model, dtype=shared.dtype)
            for name, model in models.items()
        }
    _check_early(config, [shared, *models.values()])
    # The baseline decides for all whether questions are conversations: other prompts could not be compared.
    before, is_chat = _answer(config, console, shared, config.baseline, text, config.is_chat)
    sides = {
        name: _answer(config, console, models[name], side, text, is_chat)[0]
        for name, side in config.candidate_sides().items()
    }
    return before, sides


def _check_early(config: CompareConfig, models: list[ModelSettings]) -> None:
    from evaluation.benchmarks.tasks import task_of
    from glmtune.quantization.arithmetic.methods import EXTERNAL, METHODS, OPTIONAL

    if any(side == config.baseline for side in config.candidate_sides().values()):
        raise ConfigError(
            "Baseline and candidate are the same model. Say what differs, such as"
            " `candidate.quantization=int4` or `candidate.prefix_path=runs/ptuning`, or name finished `runs`."
        )
    for model in models:
        if model.method is not None and model.method not in (*METHODS, *OPTIONAL, *EXTERNAL):
            names = [*METHODS, *OPTIONAL, *EXTERNAL, *PRECISIONS, NOT_QUANTIZED]
            raise ConfigError(unknown_name("`quantization`", model.method, names))
    for side in (config.baseline, config.candidate):
        for name in ("prefix_path", "adapter_path"):
            value = getattr(side, name)
            if value is not None and not Path(value).expanduser().exists():
                raise ConfigError(f"`{name}` is `{value}`, but there is no such file or folder.")
    for name in config.names():
        task = task_of(config.benchmark, name, config.protocol, is_chat=config.is_chat in (None, True))
        if not task.labelled:
            raise ConfigError(
                f"`benchmark.split` is `{task.split}`, but that split of {task.title} has no gold answers, so"
                " there is no accuracy to compare. Use a labelled one, such as `benchmark.split=val`."
            )


def _answer(
    config: CompareConfig,
    console: Console,
    model: ModelSettings,
    side: SideSettings,
    text: str | None,
    is_chat: bool | None,
) -> tuple[Side, bool]:
    """Load one model, let it answer everything, and let go of it."""
    import gc

    from evaluation.backends.glm import load_backend
    from evaluation.benchmarks.tasks import task_of
    from evaluation.compare.build import Side
    from evaluation.compare.pairing.runs import read_run
    from evaluation.evaluate import evaluate_model
    from evaluation.running.data_parallel import Processes

    kind = "" if model.dtype == "auto" else f" ({model.dtype})"
    console.print(f"model  {model.described}{kind}", markup=False, highlight=False, soft_wrap=True)
    gc.collect()  # the model before this one has circular references: reference counts alone do not free it
    processes = Processes.from_environment(config.wait_seconds)
    backend = load_backend(
        model,
        prefix_path=side.prefix_path,
        prefix_strength=side.prefix_strength,
        adapter_path=side.adapter_path,
        adapter_scale=side.adapter_scale,
        use_switch=side.use_switch,
        is_chat=is_chat,
        settings=config.engine,
        num_threads=config.num_threads,
        draft=config.draft,
    )
    runs = {}
    for name in config.names():
        task = task_of(config.benchmark, name, config.protocol, is_chat=backend.identity.is_chat)
        done = evaluate_model(task, backend, console, resume=config.resume, processes=processes)
        if done is not None:
            runs[task.benchmark] = read_run(done.folder)
    losses = []  # of the first process only: windows are few, and others would read the same ones
    if text is not None and not processes.rank:
        losses = backend.text_losses(text, config.text_window_tokens)
    return Side(runs, backend.weight_bytes, losses), backend.identity.is_chat


COMMAND = Command(
    name="compare",
    summary="Decide on paired questions what a quantized or tuned model loses; the exit code is the verdict.",
    schema=CompareConfig,
    run=run,
    examples=(
        "glmtune compare benchmark=ceval,mmlu baseline.quantization=bf16 candidate.quantization=int4",
        "glmtune compare runs=[runs/eval/before,runs/eval/after] gate.max_drop_pp=2",
        "glmtune compare runs=[runs/eval/a,runs/eval/b,runs/eval/c] cluster=subject paper=true",
        "glmtune compare benchmark=ceval candidates=[int8,int4,int4-g128,int4-g32]",
        "glmtune compare benchmark=all candidate.prefix_path=runs/ptuning text_file=article.txt",
    ),
)
