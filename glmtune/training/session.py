"""One session of a run: begin or go on, train under watch, and report.

A run may take several sessions: it is killed, told to stop, or goes back and starts anew. The order in which
one goes on: run folder and settings are compared, and every byte of the checkpoint (`begin`); the
fingerprints of model and data; then, in `GlmTrainer`, weights, step and order of rows, optimizer and
schedule, running loss; only now is the folder opened for writing; and random numbers last, since everything
before may draw some.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from glmtune.errors import GlmtuneError, TrainingError
from glmtune.memory import is_out_of_memory
from glmtune.models.checkpoints.config_rules import read_config
from glmtune.models.releases.source import resolve_source
from glmtune.settings import as_written
from glmtune.storage.files import write_json, write_text
from glmtune.storage.lock import lock_folder
from glmtune.tables import named_values
from glmtune.terminal.console import Console
from glmtune.training.adapt import count_parameters
from glmtune.training.callbacks import EvaluationDisplay, ProgressDisplay, StopOnSignal, TrainingLog
from glmtune.training.checkpoints.folder import (
    latest_checkpoint,
    refuse_foreign_between,
    step_of,
    write_problem,
)
from glmtune.training.distributed import collectives
from glmtune.training.distributed.launch import PARTNER_LOST
from glmtune.training.log import LOG_FILE, append_entry, read_log
from glmtune.training.measuring.picture import plot_retention
from glmtune.training.measuring.report import retention_results, retention_words
from glmtune.training.measuring.retention import RetentionMeasure
from glmtune.training.preference.reference import reference_start
from glmtune.training.preference.report import preference_results, preference_words
from glmtune.training.report import (
    RESULTS_FILE,
    SCORES,
    environment,
    model_card,
    plot_loss,
    summarize_run,
    write_results,
)
from glmtune.training.rollback import train_with_rollbacks
from glmtune.training.run_folder import RunStart, check_fingerprints, open_run, plan_start
from glmtune.training.starting.base_answers import ReplayStart
from glmtune.training.starting.changes import read_changes
from glmtune.training.starting.fitting import has_ended, refuse_unfit
from glmtune.training.starting.switch_start import SwitchStart
from glmtune.training.tracking.header import header, next_commands
from glmtune.training.tracking.trackers import RunBoard, tracker_callbacks
from glmtune.training.trainer import GlmTrainer
from glmtune.version import __version__


def resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the number of processes that there really are, whoever started them."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return {**settings, "launch": {**settings["launch"], "num_processes": count}}


def begin(
    output_dir: str, resume: str, settings: Mapping[str, Any], device: torch.device, held: ExitStack
) -> RunStart:
    """Decide, in the first process, how the run begins, and tell all processes; `train` opens the folder.

    Args:
        output_dir: the run folder.
        resume: see ``glmtune.training.run_folder.plan_start``.
        settings: all settings, nested plain values.
        device: where training will run.
        held: keeps the lock of the run folder, in the first process, until the run ends.

    Returns:
        How the run begins.

    Raises:
        ConfigError: see ``plan_start``; so are CheckpointError and TrainingError.
    """
    if (num_threads := settings["trainer"]["num_threads"]) is not None:
        torch.set_num_threads(num_threads)
    # Before anything is written: a process with other settings must not get as far as the run folder.
    processes = collectives.init_processes(device, settings["launch"]["timeout_seconds"])
    collectives.check_same_settings({name: value for name, value in settings.items() if name != "launch"})
    collectives.broadcast_from_main(lambda: _lock(output_dir, held))
    written = as_written(settings)
    start = collectives.broadcast_from_main(lambda: plan_start(output_dir, resume=resume, settings=written))
    if processes.is_main_process:
        _announce(start)
    return start


def _lock(output_dir: str, held: ExitStack) -> None:
    """Keep other runs out of the run folder before anything in it is looked at."""
    held.enter_context(lock_folder(Path(output_dir).expanduser()))


def train(
    trainer: GlmTrainer,
    start: RunStart | Path | None,
    *,
    tensorboard: bool = True,
    forced: bool = False,
    retention: RetentionMeasure | None = None,
) -> int | None:
    """Train to the end, or until a signal asks to stop.

    Args:
        trainer: ready.
        start: how the run begins; or only the checkpoint it goes on from, None for step 0, and then no
            settings are recorded.
        tensorboard: write ``runs/``, if ``trainer.report_to`` names it.
        forced: whether other rows than the checkpoint's may be learnt from here on.
        retention: measures what is kept of the base's answers; None: nobody does.

    Returns:
        The number of the signal that stopped training (a checkpoint was saved), else None.

    Raises:
        TrainingError: a loss was not finite, or something could not be written.
        ConfigError: the checkpoint was made with another model or other data, or is past the last step.
        CheckpointError: it holds something else than is trained now.
    """
    run = trainer.run_folder
    opening = _Opening(trainer, start if isinstance(start, RunStart) else RunStart(run, checkpoint=start))
    checkpoint = opening.start.checkpoint
    if checkpoint is not None:
        may_change = ("data_fingerprint",) if forced else ()
        check_fingerprints(checkpoint, trainer.fingerprints, may_change=may_change)
        refuse_unfit(trainer, checkpoint)
    log, signals = TrainingLog(run), StopOnSignal()
    progress = ProgressDisplay(log)
    evaluation = EvaluationDisplay(lambda: progress.is_bar)
    try:
        with _problems_in_words(trainer), signals:
            # Killed between the last checkpoint and the report: there is nothing to train.
            if checkpoint is not None and has_ended(trainer, checkpoint):
                opening.open()
                return None
            if trainer.is_world_process_zero() and opening.start.settings:
                _show_header(trainer, opening.start)
            trainer.add_callback(evaluation)
            reference = reference_start(trainer, checkpoint)
            # Before the others are there: this evaluation is no step of theirs. Sharded weights are whole
            # enough to evaluate only once training has begun, so there `_Baseline` does the same.
            if checkpoint is None and not trainer.is_sharded:
                opening.baseline = _measure_baseline(trainer)
            switch = None if trainer.switching is None else SwitchStart(trainer, checkpoint)
            begun: list[TrainerCallback] = [] if reference is None else [reference]
            if trainer.replay is not None:
                begun.append(ReplayStart(trainer, checkpoint))
            # Trackers first, so that one that cannot start leaves the folder as it was. It is opened before
            # anything writes to it, and the display shows the entry that the log has just made.
            trackers, board = _trackers(trainer, opening.start.settings, tensorboard)
            # What asks the model comes after the log, which leaves it out of the steps' times, and before
            # the display of the steps: a terminal has room for one.
            measures = () if retention is None else (retention,)
            for callback in (*trackers, opening, *begun, log, *measures, progress, signals, *board):
                trainer.add_callback(callback)
            if checkpoint is None and trainer.is_sharded:
                trainer.add_callback(_Baseline(trainer))
            if switch is not None:
                trainer.add_callback(switch)
            trainer.watch.console = progress.console
            if retention is not None:
                retention.display, retention.close_other = progress, evaluation.close
            try:
                train_with_rollbacks(trainer, checkpoint)
            except Exception:
                trainer.saves.wait()  # so that no checkpoint is lost that is nearly complete
                raise
            trainer.saves.finish()
    finally:
        progress.close()
        evaluation.close()
    if signals.received is not None and trainer.is_world_process_zero():
        name = signal.Signals(signals.received).name
        _say(
            f"{name}: stopped after step {trainer.state.global_step}, which is saved in {run}. "
            "The same command goes on from there."
        )
    return signals.received


@contextmanager
def _problems_in_words(trainer: GlmTrainer) -> Generator[None]:
    """Turn what may end any training, whatever it trains, into errors that say what to do."""
    try:
        yield
    except OSError as error:  # the log on a full disk, or another process's part of a checkpoint
        raise TrainingError(write_problem(trainer.run_folder / LOG_FILE, error)) from error
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise TrainingError(_memory_problem(trainer)) from error
        if collectives.is_connection_lost(error):
            raise TrainingError(_lost_problem(trainer)) from error
        raise


def report(trainer: GlmTrainer, settings: Mapping[str, Any], origin: Mapping[str, Any]) -> dict[str, Any]:
    """Write the results, the loss curve and the model card of a finished run, and show the main numbers.

    Args:
        trainer: trained to the end.
        settings: all settings, nested plain values.
        origin: where model and data came from: fingerprints, path and number of rows.

    Returns:
        Content of ``all_results.json``.

    Raises:
        TrainingError: a file could not be written.
    """
    run, metric = trainer.run_folder, str(trainer.args.metric_for_best_model)
    entries = read_log(run)
    target = (settings.get("retention") or {}).get("target")
    trained, total = count_parameters(trainer.tuned.model)
    summary = summarize_run(entries, metric=metric, target=target)
    results = {
        "finished": True,
        "glmtune": __version__,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        **summary,
        **retention_results(run, entries, metric=metric, target=target),
        **preference_results(entries, summary.get("best_step")),
        "trained_parameters": trained,
        "all_parameters": total,
        **origin,
    }
    if trainer.switching is not None:
        results["switch"] = trainer.switching.results(run / "last")
    if changes := read_changes(run):
        results["changed_settings"] = changes
    if trainer.is_world_process_zero():
        try:
            # The results last: their `finished` is what tells a later start that nothing is left to do.
            plot_loss(entries, run / "training_loss.png")
            plot_retention(entries, run / "retention.png", metric=metric, target=target)
            write_text(run / "README.md", model_card(settings, results))
            results = write_results(run, results)
        except OSError as error:
            raise TrainingError(write_problem(run / RESULTS_FILE, error)) from error
        _show(run, results)
        _show_next(as_written(settings), run)
    return results


def _show_header(trainer: GlmTrainer, start: RunStart) -> None:
    rows = header(trainer, start.settings)
    if start.checkpoint is not None:
        rows.append(("from", f"step {step_of(start.checkpoint):,}"))
    Console(stderr=True, highlight=False).print(named_values(rows))


def _show_next(settings: Mapping[str, Any], run: Path) -> None:
    """Show what one types next, on lines of their own: they are to be copied."""
    try:
        kind = read_config(resolve_source(settings["model"]["source"])).get("model_type")
    except GlmtuneError:  # a finished run is started again, and its base is gone
        kind = None
    commands = next_commands(settings, run, model_type=kind or "chatglm")
    for word, command in zip(("next:", "or:  "), commands, strict=True):
        Console(highlight=False, soft_wrap=True).print(f"{word} {command}", markup=False)


def _trackers(
    trainer: GlmTrainer, settings: Mapping[str, Any], tensorboard: bool
) -> tuple[list[TrainerCallback], list[TrainerCallback]]:
    """Return the callbacks of trackers, and TensorBoard's, which writes into the run folder."""
    names = trainer.settings.report_to
    trained, total = count_parameters(trainer.tuned.model)
    facts = {
        "train_rows": len(trainer.rows.train.lengths),
        "trained_parameters": trained,
        "all_parameters": total,
        **trainer.fingerprints,
    }
    wanted = tensorboard and "tensorboard" in names and trainer.is_world_process_zero()
    board: list[TrainerCallback] = [RunBoard(trainer.run_folder, settings)] if wanted else []
    return tracker_callbacks(names, settings, facts), board


def _lost_problem(trainer: GlmTrainer) -> str:
    newest = latest_checkpoint(trainer.run_folder)
    kept = f"{newest.name} is intact" if newest else "no checkpoint had been written yet"
    return (
        f"This process {PARTNER_LOST} at step {trainer.state.global_step + 1}: one of them has ended or does "
        f"not answer. {kept[0].upper()}{kept[1:]}; the same command goes on from there. What the other "
        "process wrote last says why it ended."
    )


def _memory_problem(trainer: GlmTrainer) -> str:
    args = trainer.args
    return (
        f"Memory ran out at step {trainer.state.global_step + 1}, with `trainer.per_device_train_batch_size` "
        f"{args.per_device_train_batch_size} (evaluation: {args.per_device_eval_batch_size}) and "
        f"`trainer.gradient_checkpointing` {bool(args.gradient_checkpointing)}. The longest batch comes "
        "first, so what passes it will last. Try `trainer.gradient_checkpointing=true`, half the batch size "
        "with twice `trainer.gradient_accumulation_steps`, a smaller `data.max_source_length` or "
        "`data.max_target_length`, or `model.dtype=bfloat16`."
    )


class _Opening(TrainerCallback):
    """Opens the run folder when everything is loaded and restored, just before the first step.

    Attributes:
        start: how the run begins.
        baseline: evaluation of the base alone, to be the first line of the log.
    """

    def __init__(self, trainer: GlmTrainer, start: RunStart) -> None:
        self.start = start
        self.baseline: dict[str, float] | None = None
        self._trainer = trainer
        self._is_open = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._is_open:  # training begins once more after a rollback
            self.open(max_steps=state.max_steps)

    def open(self, max_steps: int = 0) -> None:
        """Open it in the main process; where that fails, all processes end."""
        moved = collectives.broadcast_from_main(lambda: self._open(max_steps))
        self._is_open = True
        if not self._trainer.is_world_process_zero():
            return
        if moved is not None:
            _say(f"what is replaced in {self.start.folder} was moved to {moved}")
        if self.baseline is not None:
            _say(f"eval loss before tuning {self.baseline['eval_loss']:.4f}")

    def _open(self, max_steps: int) -> Path | None:
        run, checkpoint = self.start.folder, self.start.checkpoint
        refuse_foreign_between(run, step_of(checkpoint) or 0 if checkpoint else 0, max_steps)
        moved = open_run(self.start)
        try:
            write_json(run / "environment.json", environment(seed=self._trainer.args.seed))
            if self.baseline is not None:
                append_entry(run, {"step": 0, "epoch": 0.0, **self.baseline})
        except OSError as error:  # ours, so that the other processes are told
            raise TrainingError(write_problem(run / LOG_FILE, error)) from error
        return moved


class _Baseline(TrainerCallback):
    """Evaluates the base alone as soon as its weights are sharded, before which nobody may hold them all."""

    def __init__(self, trainer: GlmTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer.eval_dataset is not None:
            with self._trainer.base_alone():
                self._trainer.evaluate()


def _measure_baseline(trainer: GlmTrainer) -> dict[str, float] | None:
    """Evaluate the base alone; None without rows to evaluate on."""
    if trainer.eval_dataset is None:
        return None
    with trainer.base_alone():
        return trainer.evaluate()


def _announce(start: RunStart) -> None:
    for name, problem in start.damaged.items():
        _say(f"! {name} is not whole: {problem}. It is passed over, and set aside when training begins.")
    if start.finished is not None:
        _say(
            f"{start.folder} holds this run, finished at step {start.finished['steps']}. To train anew, add "
            "`resume=never` or name another `output_dir`."
        )
        _show_next(start.settings, start.folder)
    if start.checkpoint is not None:
        _say(f"going on from {start.checkpoint}")
    if start.changes:
        _say(f"with other settings from here on: {'; '.join(start.changes)}")


def _show(run: Path, results: Mapping[str, Any]) -> None:
    scores = [(name.replace("_", " "), results[name]) for name in ("steps", *SCORES) if name in results]
    rows = [(name, f"{value:.4f}" if isinstance(value, float) else str(value)) for name, value in scores]
    trained = f"{results['trained_parameters']:,} of {results['all_parameters']:,} parameters"
    console = Console(highlight=False, soft_wrap=True)
    console.print(named_values([*rows, ("trained", trained)]))
    for line in (*preference_words(results), *retention_words(results)):
        console.print(line, markup=False)
    console.print(f"saved in {run / 'last'}", markup=False)


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
