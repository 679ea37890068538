"""Evaluate a model on a benchmark by its published protocol: `glmtune eval`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.backends.endpoint import EndpointSettings
from evaluation.settings import ALL, BenchmarkSettings, SamplingSettings
from glmtune.errors import ConfigError
from glmtune.inference.settings import DraftSettings, EngineSettings
from glmtune.models.settings import ModelSettings
from glmtune.settings import (
    SCALE_HELP,
    STRENGTH_HELP,
    as_written,
    check_choice,
    check_range,
    check_strengths,
    setting,
)
from glmtune.tracking.services import TRACKERS
from recipes.words.compose import Command

if TYPE_CHECKING:
    from evaluation.backend import Backend
    from evaluation.compare.steps import Step
    from evaluation.reporting.results import Evaluated
    from evaluation.running.data_parallel import Processes
    from glmtune.terminal.console import Console

BACKENDS = ("glmtune", "openai", "vllm")
UNUSED_OF_MODEL = {
    "device": "auto",
    "quantization": None,
    "quantization_bit": None,
    "quantization_activations": None,
    "quantization_embeddings": None,
    "verify_checksums": True,
}
"""Settings of `model` that only our own backend reads, with what they are where nobody sets them."""
TUNED = ("prefix_path", "adapter_path", "checkpoints")
FAILED_QUESTIONS = 5
"""Exit code: all is written, but some questions got no answer."""
MAX_SAMPLES = 10_000
"""More answers to a question than anybody draws: a mistake."""
DEFAULT_MODEL = ModelSettings().source
"""Stands for "no model was named": scoring saved completions and asking a server need none."""


@dataclass(frozen=True)
class EvalConfig:
    """What to ask, whom, how, and where the answers go."""

    benchmark: BenchmarkSettings = setting(BenchmarkSettings, "the questions")
    samples: int | None = setting(
        None, "answers drawn to each question: mean, majority vote, pass@k; default: one, the likeliest"
    )
    sampling: SamplingSettings = setting(SamplingSettings, "with samples: how they are drawn")
    model: ModelSettings = setting(ModelSettings, "the base model")
    engine: EngineSettings = setting(EngineSettings, "how much is computed at once")
    draft: DraftSettings = setting(DraftSettings, "a smaller model that drafts tokens for it")
    protocol: str | None = setting(
        None,
        "zero_shot_cot, few_shot_direct, few_shot_cot, ...; default: that of the published GLM tables for"
        " this kind of model",
    )
    is_chat: bool | None = setting(
        None, "ask in conversations (true) or as plain text (false); default: by the model's name"
    )
    prefix_path: str | None = setting(
        None, "tuned prefix: a run folder, one of its checkpoints, or a file (also the official one)"
    )
    prefix_strength: float = setting(1.0, STRENGTH_HELP)
    adapter_path: str | None = setting(None, "LoRA adapter: a run folder or one of its checkpoints")
    adapter_scale: float = setting(1.0, SCALE_HELP)
    checkpoints: str | None = setting(
        None, "run folder of `glmtune train`: ask its base and every checkpoint there is, and draw a curve"
    )
    use_switch: bool = setting(
        True, "obey the switch of what was tuned, if it has one; false: it applies to every prompt"
    )
    backend: str = setting("glmtune", "who computes: glmtune, openai (any server with its interface), vllm")
    endpoint: EndpointSettings = setting(EndpointSettings, "with backend=openai: the server")
    completions: str | None = setting(
        None, "score this JSONL file (or the folder of an earlier run) without a model; model=NAME says whose"
    )
    allow_missing: bool = setting(
        False, "with completions: score a part of the questions, as a PARTIAL result"
    )
    output_dir: str | None = setting(
        None, "folder of answers and report; default: under runs/eval, the same for the same run"
    )
    paper: bool = setting(False, "also write tables as LaTeX (tables.tex) and figures as SVG and PDF")
    report_to: list[str] = setting(list, "trackers: tensorboard, wandb, mlflow, swanlab")
    resume: bool = setting(True, "go on where a run stopped; false begins anew and moves what is there aside")
    num_threads: int | None = setting(None, "threads of the CPU; default: as PyTorch chooses")
    wait_seconds: float = setting(
        1800.0, "with several processes: without a sign of the others for so long, give up"
    )

    def __post_init__(self) -> None:
        """Check what needs no file.

        Raises:
            ConfigError: a value is not allowed, or settings contradict each other.
        """
        check_choice("backend", self.backend, BACKENDS)
        for tracker in self.report_to:
            check_choice("report_to", tracker, TRACKERS)
        check_range("wait_seconds", self.wait_seconds, low=0)
        self._check_samples()
        if not self.use_switch and (self.prefix_path, self.adapter_path, self.checkpoints) == (None,) * 3:
            raise ConfigError(
                "`use_switch` is False, but nothing that was tuned is given, which could have a switch. Leave"
                " it out."
            )
        if self.num_threads is not None:
            check_range("num_threads", self.num_threads, low=1)
        if self.prefix_path is not None and self.adapter_path is not None:
            raise ConfigError(
                "`prefix_path` and `adapter_path` are both set, but a model is tuned one way. Leave one out."
            )
        for name in ("prefix_path", "adapter_path"):
            if self.checkpoints is not None and (value := getattr(self, name)) is not None:
                raise ConfigError(
                    f"`{name}` is `{value}`, but `checkpoints` is `{self.checkpoints}`, whose every"
                    " checkpoint is asked. Leave one of them out."
                )
        check_strengths(
            prefix=self.prefix_path,
            prefix_strength=self.prefix_strength,
            adapter=self.adapter_path,
            adapter_scale=self.adapter_scale,
        )
        if self.completions is not None and self.benchmark.name == ALL:
            raise ConfigError(
                f"`completions` is `{self.completions}`, but `benchmark` is `all`: a file answers one."
                " Name it, such as `benchmark=bbh`."
            )
        if self.allow_missing and self.completions is None:
            raise ConfigError(
                "`allow_missing` is True, but no `completions` are given: a model is asked every question. To"
                " ask fewer, use `benchmark.limit` or `benchmark.subjects`."
            )
        self._refuse_unused()

    def _check_samples(self) -> None:
        if self.samples is not None:
            check_range("samples", self.samples, low=1, high=MAX_SAMPLES)
            if self.completions is not None:
                raise ConfigError(
                    f"`samples` is {self.samples}, but `completions` are there already, one to each question."
                    " Leave one of them out; the report of drawn answers is in the folder of their run."
                )
        elif self.sampling != SamplingSettings():
            raise ConfigError(
                "`sampling` is given, but the likeliest answer to each question is taken, and nothing is"
                " drawn. Add `samples=8` (or 1), or leave it out."
            )

    def _refuse_unused(self) -> None:
        """Refuse settings of a model that nobody would read."""
        if self.completions is not None:
            who, unused = "`completions` are scored without a model", TUNED
        elif self.backend != "glmtune":
            who, unused = f"`backend` is `{self.backend}`", (*TUNED, "num_threads")
        else:
            return
        for name in unused:
            if (value := getattr(self, name)) is not None:
                raise ConfigError(
                    f"`{name}` is `{value}`, but {who}, so it would be ignored. Leave it out (a merged model"
                    " for a server is written by `glmtune export`)."
                )
        if self.draft.source is not None:
            raise ConfigError(
                f"`draft.source` is `{self.draft.source}`, but {who}, so it would be ignored. Leave it out."
            )
        for name, usual in UNUSED_OF_MODEL.items():
            if (value := getattr(self.model, name)) != usual:
                raise ConfigError(
                    f"`model.{name}` is `{value}`, but {who}, so it would be ignored. Leave it out."
                )
        if self.backend == "openai" and self.is_chat and not self.endpoint.is_chat:
            raise ConfigError(
                "`is_chat` is True and `endpoint.is_chat` is False, but questions are asked one way."
                " Leave one out."
            )
        if self.backend == "openai" and self.model.source != DEFAULT_MODEL:
            raise ConfigError(
                f"`model.source` is `{self.model.source}`, but `backend` is `openai`, and the server chooses"
                " the model. Name it as the server does, with `endpoint.model`."
            )


def run(config: EvalConfig) -> tuple[Evaluated, ...]:
    """Find the questions, ask the model (or read its saved answers), score, and report.

    Args:
        config: all settings.

    Returns:
        One per benchmark; nothing in processes other than the first.

    Raises:
        GlmtuneError: a setting, the data, the model or the answers cannot be used; what is answered is kept.
    """
    from evaluation.backend import Drawing
    from evaluation.benchmarks.tasks import PUBLISHED, task_of
    from evaluation.evaluate import evaluate_saved
    from evaluation.running.data_parallel import Processes
    from glmtune.terminal.console import Console
    from glmtune.tracking.services import check_trackers

    console = Console()
    check_trackers(config.report_to, setting="report_to")
    names = PUBLISHED if config.benchmark.name == ALL else (config.benchmark.name,)
    output_dir = Path(config.output_dir).expanduser() if config.output_dir else None
    # Data and settings are checked before a model loads. Whether it is a chat model is not known before
    # that, so the tasks of this check are thrown away and made again for the model found.
    tasks = [
        task_of(config.benchmark, name, config.protocol, is_chat=config.is_chat in (None, True))
        for name in names
    ]
    if config.samples is not None and (config.protocol, config.is_chat) != (None, None):
        for task in tasks:
            task.drawn(Drawing(config.sampling.temperature))
    if config.completions is not None:
        saved = Path(config.completions).expanduser()
        done = evaluate_saved(
            tasks[0],
            saved,
            console,
            output_dir=output_dir,
            allow_missing=config.allow_missing,
            model=None if config.model.source == DEFAULT_MODEL else config.model.source,
            paper=config.paper,
        )
        _send(config, [done])
        return (done,)

    processes = Processes.from_environment(config.wait_seconds)
    if config.checkpoints is not None:
        return _run_checkpoints(config, config.checkpoints, names, console, processes)
    trained = _trained_with(config)
    if trained and not processes.rank:
        _say_as_trained(config, trained, console)
    runs = _ask(config, trained, names, console, processes)
    if len(runs) > 1:
        _summarize(runs, output_dir)
    _send(config, runs)
    return tuple(runs)


def _send(config: EvalConfig, runs: Sequence[Evaluated]) -> None:
    """Send the figures to the trackers, each benchmark as a run."""
    from evaluation.tracked import send_run

    settings = as_written(dataclasses.asdict(config))
    for each in runs:
        send_run(config.report_to, {**settings, "run": dict(each.fingerprint)}, {0: [each]}, each.folder)


def _ask(
    config: EvalConfig,
    trained: Mapping[str, Any],
    names: Sequence[str],
    console: Console,
    processes: Processes,
) -> list[Evaluated]:
    """Load a model and ask it all benchmarks; nothing comes back in processes other than the first."""
    from evaluation.backend import Drawing
    from evaluation.benchmarks.tasks import task_of
    from evaluation.evaluate import evaluate_model, evaluate_sampled

    output_dir = Path(config.output_dir).expanduser() if config.output_dir else None
    backend = _backend(config, trained)
    runs: list[Evaluated] = []
    for name in names:
        task = task_of(config.benchmark, name, config.protocol, is_chat=backend.identity.is_chat)
        options: dict[str, Any] = {
            "output_dir": output_dir / name if output_dir and len(names) > 1 else output_dir,
            "resume": config.resume,
            "processes": processes,
            "paper": config.paper,
        }
        if config.samples is None:
            finished = evaluate_model(task, backend, console, **options)
        else:
            drawing = Drawing(**dataclasses.asdict(config.sampling))
            finished = evaluate_sampled(
                task, backend, console, num_answers=config.samples, drawing=drawing, **options
            )
        if finished is not None:
            runs.append(finished)
    return runs


def _run_checkpoints(
    config: EvalConfig, folder: str, names: Sequence[str], console: Console, processes: Processes
) -> tuple[Evaluated, ...]:
    """Ask the base and every checkpoint of a run by the same prompts, one model in memory at a time."""
    import gc

    from evaluation.compare.steps import find_steps, report_steps
    from evaluation.tracked import send_run

    run_folder = Path(folder).expanduser()
    output_dir = Path(config.output_dir).expanduser() if config.output_dir else None
    steps = {step.number: _at_step(config, step) for step in find_steps(run_folder)}
    trained = _trained_with(list(steps.values())[-1])
    if trained and not processes.rank:
        _say_as_trained(config, trained, console)
    done: dict[int, list[Evaluated]] = {}
    for number, each in steps.items():
        if not processes.rank:
            what = f"checkpoint-{number}" if number else "the base"
            console.print(f"model  {what} of {run_folder}", markup=False, highlight=False, soft_wrap=True)
        gc.collect()  # models have circular references: reference counts alone do not free them
        inside = None if output_dir is None else str(output_dir / f"step-{number}")
        settings = dataclasses.replace(each, output_dir=inside)
        done[number] = _ask(settings, trained, names, console, processes)
    if not processes.rank:
        place = report_steps(run_folder, done, console, output_dir=output_dir, paper=config.paper)
        send_run(config.report_to, as_written(dataclasses.asdict(config)), done, place)
    return tuple(each for several in done.values() for each in several)


def _at_step(config: EvalConfig, step: Step) -> EvalConfig:
    """Return the settings that ask one checkpoint, or the base."""
    changes: dict[str, Any] = {"checkpoints": None, **step.tuned}
    if source := changes.pop("source", None):
        changes["model"] = dataclasses.replace(config.model, source=source)
    if not step.tuned:
        changes["use_switch"] = True  # the base has none
    return dataclasses.replace(config, **changes)


def run_command(config: EvalConfig) -> int:
    """Evaluate, and say by the exit code whether every question got its answer.

    Args:
        config: all settings.

    Returns:
        0, or `FAILED_QUESTIONS` where results are PARTIAL as questions failed.

    Raises:
        GlmtuneError: see `run`.
    """
    evaluated = run(config)
    if evaluated:
        from glmtune.terminal.console import Console

        Console().print(
            f"next: {_next_command(config, evaluated)}", markup=False, highlight=False, soft_wrap=True
        )
    return FAILED_QUESTIONS if any(done.result.failed for done in evaluated) else 0


def _next_command(config: EvalConfig, evaluated: tuple[Evaluated, ...]) -> str:
    """Word what one types next: a score alone says little, so it is compared."""
    from glmtune.command_line import command_words, model_words

    if config.checkpoints is not None:
        return command_words("compare", {"runs": f"[{evaluated[0].folder},{evaluated[-1].folder}]"})
    if config.backend != "glmtune" or config.completions is not None or config.samples is not None:
        return command_words("compare", {"runs": f"[{evaluated[0].folder},OTHER_RUN]"})
    values = as_written(dataclasses.asdict(config))
    asked = {"benchmark": config.benchmark.name}
    asked |= {f"benchmark.{name}": values["benchmark"][name] for name in ("data_dir", "system", "template")}
    tuned = {f"candidate.{name}": values[name] for name in ("prefix_path", "adapter_path")}
    strengths = {"prefix_strength": config.prefix_strength, "adapter_scale": config.adapter_scale}
    tuned |= {f"candidate.{name}": f"{value:g}" for name, value in strengths.items() if value != 1}
    ways = None if any(tuned.values()) or config.model.method else "[int8,int4]"
    return command_words("compare", {**asked, **model_words(values["model"]), **tuned, "candidates": ways})


def _trained_with(config: EvalConfig) -> Mapping[str, Any]:
    """Return what shaped the prompts that the model was tuned on; {} where nothing tells."""
    if config.backend != "glmtune":
        return {}
    from glmtune.adapter import find_adapter
    from glmtune.data.as_trained import trained_with, trained_with_prefix
    from glmtune.prefix.checkpoint import find_prefix

    if config.prefix_path is not None:
        return trained_with_prefix(find_prefix(config.prefix_path)) or {}
    if config.adapter_path is not None:
        return trained_with(find_adapter(config.adapter_path)) or {}
    folder = Path(config.model.source).expanduser()
    return (trained_with(folder) if folder.is_dir() else None) or {}


def _say_as_trained(config: EvalConfig, trained: Mapping[str, Any], console: Console) -> None:
    """Say what is taken over of the training, and what is not: benchmarks have questions of their own."""
    taken = []
    if config.is_chat is None and "is_chat" in trained:
        taken.append(f"is_chat={str(trained['is_chat']).lower()}")
    if trained.get("system"):
        taken.append(f"its system message, {trained['system'][:40]!r}")
    left = f"data.source_prefix={trained['source_prefix']!r}" if trained.get("source_prefix") else ""
    words = "; ".join(
        filter(None, [", ".join(taken), left and f"{left} is left out, as it is no benchmark's"])
    )
    if words:
        console.print(f"as in the training: {words}", highlight=False, soft_wrap=True)


def _backend(config: EvalConfig, trained: Mapping[str, Any]) -> Backend:
    if config.backend == "openai":
        from evaluation.backends.openai_api import OpenAIBackend

        endpoint = config.endpoint
        if config.is_chat is not None:
            endpoint = dataclasses.replace(endpoint, is_chat=config.is_chat)
        return OpenAIBackend(endpoint)
    if config.backend == "vllm":
        from evaluation.backends.vllm_engine import VllmBackend
        from glmtune.loading import load_tokenizer
        from glmtune.models.releases.source import resolve_source

        if config.model.is_split:
            raise ConfigError(
                "`model.device_map` or `model.num_gpus` is given, but `backend` is `vllm`, which is not split"
                " by layers. Leave it out, or use `backend=glmtune`."
            )
        source = config.model.source
        tokenizer = load_tokenizer(source, family=config.model.family)
        folder = str(resolve_source(source))
        return VllmBackend(folder, tokenizer, name=source, is_chat=config.is_chat, dtype=config.model.dtype)
    from evaluation.backends.glm import load_backend

    return load_backend(
        config.model,
        prefix_path=config.prefix_path,
        prefix_strength=config.prefix_strength,
        adapter_path=config.adapter_path,
        adapter_scale=config.adapter_scale,
        is_chat=trained.get("is_chat") if config.is_chat is None else config.is_chat,
        settings=config.engine,
        num_threads=config.num_threads,
        system=trained.get("system"),
        use_switch=config.use_switch,
        draft=config.draft,
    )


def _summarize(runs: list[Evaluated], output_dir: Path | None) -> None:
    from evaluation.evaluate import default_summary_folder
    from evaluation.reporting.summary import summary_table, write_summary
    from evaluation.running.fingerprint import described
    from glmtune.storage.lock import lock_folder
    from glmtune.terminal.console import Console

    console = Console()
    model = described(runs[0].fingerprint["model"])
    summary_table(runs, model).show(console)
    folder = output_dir or default_summary_folder(runs)
    with lock_folder(folder):
        written = write_summary(runs, model, folder)
    console.print(f"Written: {', '.join(map(str, written))}", markup=False, highlight=False, soft_wrap=True)


COMMAND = Command(
    name="eval",
    summary="Evaluate a model on C-Eval, MMLU, GSM8K, BBH and others by the published protocols.",
    schema=EvalConfig,
    run=run_command,
    examples=(
        "glmtune eval benchmark=ceval",
        "glmtune eval benchmark=mmlu benchmark.data_dir=mmlu_data model=chatglm2-6b",
        "glmtune eval benchmark=ceval protocol=few_shot_direct benchmark.subjects=[law,logic] is_chat=false",
        "glmtune eval benchmark=all prefix_path=runs/ptuning",
        "glmtune eval benchmark=exam prefix_path=runs/ptuning",
        "glmtune eval benchmark=mmlu_pro benchmark.limit=20",
        "glmtune eval benchmark=gsm8k benchmark.system='Answer briefly.'",
        "glmtune eval benchmark=exam checkpoints=runs/ptuning",
        "glmtune eval benchmark=gsm8k samples=8 sampling.temperature=0.8 paper=true",
        "glmtune eval benchmark=bbh completions=answers.jsonl",
        "glmtune eval benchmark=gsm8k backend=openai endpoint.base_url=http://localhost:8000/v1",
        "torchrun --nproc-per-node=2 -m glmtune eval benchmark=ceval",
    ),
)
