"""One session of a run: begin or go on, train under watch, and report.

A run may take several sessions: it is killed, told to stop, or goes back and starts anew. The order in which
one goes on: run folder and settings are compared (`begin`); the fingerprints of model and data; then, in
`GlmTrainer`, weights, step and order of rows, optimizer and schedule, running loss, and random numbers last,
since everything before may draw some.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from glmtune.errors import TrainingError
from glmtune.files import write_json, write_text
from glmtune.memory import is_out_of_memory
from glmtune.tables import named_values
from glmtune.training import callbacks
from glmtune.training.adapt import count_parameters
from glmtune.training.callbacks import ProgressDisplay, StopOnSignal, TrainingLog
from glmtune.training.checkpoints.folder import latest_checkpoint, step_of, write_problem
from glmtune.training.distributed import collectives
from glmtune.training.distributed.launch import PARTNER_LOST
from glmtune.training.log import LOG_FILE, append_entry, read_log
from glmtune.training.report import SCORES, environment, model_card, plot_loss, summarize_run
from glmtune.training.rollback import train_with_rollbacks
from glmtune.training.run_folder import RESULTS_FILE, RunStart, check_fingerprints, start_run
from glmtune.training.trainer import GlmTrainer
from glmtune.version import __version__


def resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the number of processes that there really are, whoever started them."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return {**settings, "launch": {**settings["launch"], "num_processes": count}}


def begin(output_dir: str, resume: str, settings: Mapping[str, Any], device: torch.device) -> RunStart:
    """Open the run folder, in the first process, and tell all processes what was found.

    Args:
        output_dir: the run folder.
        resume: see ``glmtune.training.run_folder.start_run``.
        settings: all settings, nested plain values.
        device: where training will run.

    Returns:
        How the run begins.

    Raises:
        ConfigError: see ``start_run``; so are CheckpointError and TrainingError.
    """
    if (num_threads := settings["trainer"]["num_threads"]) is not None:
        torch.set_num_threads(num_threads)
    # Before anything is written: a process with other settings must not get as far as the run folder.
    processes = collectives.init_processes(device, settings["launch"]["timeout_seconds"])
    collectives.check_same_settings({name: value for name, value in settings.items() if name != "launch"})
    start = collectives.broadcast_from_main(lambda: start_run(output_dir, resume=resume, settings=settings))
    if processes.is_main_process:
        _announce(start)
    return start


def train(trainer: GlmTrainer, checkpoint: Path | None, *, tensorboard: bool = True) -> int | None:
    """Train to the end, or until a signal asks to stop.

    Args:
        trainer: ready.
        checkpoint: where to go on from, None starts at step 0.
        tensorboard: write ``runs/``.

    Returns:
        The number of the signal that stopped training (a checkpoint was saved), else None.

    Raises:
        TrainingError: a loss was not finite, or something could not be written.
        ConfigError: the checkpoint was made with another model or other data.
    """
    run = trainer.run_folder
    if checkpoint is not None:
        check_fingerprints(checkpoint, trainer.fingerprints)
    log, signals = TrainingLog(run), StopOnSignal()
    progress = ProgressDisplay(log)
    try:
        with signals:
            if trainer.is_world_process_zero():
                write_json(run / "environment.json", environment(seed=trainer.args.seed))
            # Killed between the last checkpoint and the report: there is nothing to train.
            if checkpoint is not None and trainer.has_ended(checkpoint):
                return None
            if checkpoint is None:
                _begin_log(trainer)
            # Before the callbacks are there: this evaluation is no step of theirs. Sharded weights are only
            # whole enough to evaluate once training has begun, so there `_Baseline` does the same.
            if checkpoint is None and not trainer.is_sharded:
                _measure_baseline(trainer)
            # The log before the display, which shows the entry that the log has just made.
            for callback in (log, progress, signals):
                trainer.add_callback(callback)
            if checkpoint is None and trainer.is_sharded:
                trainer.add_callback(_Baseline(trainer))
            if tensorboard and trainer.is_world_process_zero():
                trainer.add_callback(
                    callbacks.tensorboard(run, after=step_of(checkpoint) if checkpoint else None)
                )
            trainer.watch.console = progress.console
            try:
                train_with_rollbacks(trainer, checkpoint)
            except Exception:
                trainer.saves.wait()  # so that no checkpoint is lost that is nearly complete
                raise
            trainer.saves.finish()
    except OSError as error:  # the log on a full disk, or another process's part of a checkpoint
        raise TrainingError(write_problem(run / LOG_FILE, error)) from error
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise TrainingError(_memory_problem(trainer)) from error
        if collectives.is_connection_lost(error):
            raise TrainingError(_lost_problem(trainer)) from error
        raise
    finally:
        progress.close()
    if signals.received is not None and trainer.is_world_process_zero():
        name = signal.Signals(signals.received).name
        _say(
            f"{name}: stopped after step {trainer.state.global_step}, which is saved in {run}. "
            "The same command goes on from there."
        )
    return signals.received


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
    run = trainer.run_folder
    entries = read_log(run)
    trained, total = count_parameters(trainer.tuned.model)
    results = {
        "finished": True,
        "glmtune": __version__,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        **summarize_run(entries, metric=str(trainer.args.metric_for_best_model)),
        "trained_parameters": trained,
        "all_parameters": total,
        **origin,
    }
    if trainer.is_world_process_zero():
        try:
            # The results last: their `finished` is what tells a later start that nothing is left to do.
            plot_loss(entries, run / "training_loss.png")
            write_text(run / "README.md", model_card(settings, results))
            write_json(run / RESULTS_FILE, results)
        except OSError as error:
            raise TrainingError(write_problem(run / RESULTS_FILE, error)) from error
        _show(run, results)
    return results


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


class _Baseline(TrainerCallback):
    """Evaluates the base alone as soon as its weights are sharded, before which nobody may hold them all."""

    def __init__(self, trainer: GlmTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer.eval_dataset is not None:
            with self._trainer.tuned.base_alone():
                self._trainer.evaluate()


def _begin_log(trainer: GlmTrainer) -> None:
    if trainer.is_world_process_zero():
        write_text(trainer.run_folder / LOG_FILE, "")


def _measure_baseline(trainer: GlmTrainer) -> None:
    """Log the evaluation loss of the base alone as the first line."""
    run = trainer.run_folder
    if trainer.eval_dataset is None:
        return
    with trainer.tuned.base_alone():
        metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        append_entry(run, {"step": 0, "epoch": 0.0, **metrics})
        _say(f"eval loss before tuning {metrics['eval_loss']:.4f}")


def _announce(start: RunStart) -> None:
    if start.set_aside is not None:
        _say(f"the earlier run in {start.folder} was moved to {start.set_aside}")
    if start.finished is not None:
        _say(
            f"{start.folder} holds this run, finished at step {start.finished['steps']}. To train anew, add "
            "`resume=never` or name another `output_dir`."
        )
    elif start.checkpoint is not None:
        _say(f"going on from {start.checkpoint}")


def _show(run: Path, results: Mapping[str, Any]) -> None:
    scores = [(name.replace("_", " "), results[name]) for name in ("steps", *SCORES) if name in results]
    rows = [(name, f"{value:.4f}" if isinstance(value, float) else str(value)) for name, value in scores]
    trained = f"{results['trained_parameters']:,} of {results['all_parameters']:,} parameters"
    console = Console(highlight=False, soft_wrap=True)
    console.print(named_values([*rows, ("trained", trained)]))
    console.print(f"saved in {run / 'last'}", markup=False)


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
