"""Settings that differ from those a run began with: which matter, which may change, and the record of it.

A resumed run must end with the very numbers of one that was never stopped, so every setting that decides them
has to be as it was. Three kinds are told apart:

    FREE, PLACES   decide no number (or its last digits): may differ at any time
    the others     decide the numbers: differ under `resume=force` only, and then hold from the next step on
    IMPOSSIBLE     decided the run's beginning, or the shape of what it tunes: never
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glmtune.data.lengths import LENGTHS
from glmtune.errors import CheckpointError, ConfigError
from glmtune.storage.checksums import checked_json, json_with_checksum
from glmtune.storage.files import write_json

CHANGES_FILE = "changed_settings.json"
# What names the data, which may lie elsewhere tomorrow: its fingerprint is compared instead.
DATA_PLACES = frozenset({"data.name", "data.dir", "data.train_file"})
# Left to the data, they stay what the run began with.
LEFT_TO_THE_DATA = frozenset(f"data.{name}" for name in LENGTHS)
SWITCH = ("switch", "switch_min_auroc", "switch_prompts")
# Settings that a run may change on its way: they decide neither the numbers nor their order. Where the model
# lies may change too, because its fingerprint is compared instead.
FREE = (
    frozenset(
        {"output_dir", "resume", "model.source", "model.device", "model.family"}
        | {"data.test_file", "data.max_predict_samples"}
        | {f"trainer.{name}" for name in ("logging_steps", "eval_steps", "save_steps", "save_total_limit")}
        | {
            f"trainer.{name}"
            for name in ("early_stopping_patience", "report_to", "per_device_eval_batch_size")
        }
        | {
            f"trainer.{name}"
            for name in ("max_rollbacks", "rollback_rate", "spike_deviations", "stall_seconds")
        }
        | {f"trainer.{name}" for name in ("dataloader_num_workers", "num_threads", "gradient_checkpointing")}
        | {"trainer.async_save"}
        # Where rows are encoded and kept, not which they are.
        | {f"data.{name}" for name in ("cache", "cache_dir", "num_workers")}
        # Measured, not learnt from; that `best` obeys the target is looked after in IMPOSSIBLE.
        | {"retention.exam", "retention.exam_limit"}
        # Fitted to the base, which is as it was: a run may have a switch, another one, or none from here on.
        | {f"{kind}.{name}" for kind in ("prefix", "lora") for name in SWITCH}
    )
    | DATA_PLACES
)
PLACES = ("launch", "deepspeed", "distributed", "plan")
"""Groups that say where a run computes and keeps its numbers, which may change too: checkpoints hold whole
tensors, and rows keep their order, so the numbers change in their last digits only."""
# Rows per optimizer step = processes x rows per device x accumulation steps: only the product counts.
ROW_FACTORS = ("trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps")
ROWS_PER_STEP = "rows per optimizer step"
WORLD_HINT = (
    "\n(That is `launch.num_processes` on all machines × `trainer.per_device_train_batch_size` × "
    "`trainer.gradient_accumulation_steps`: with another number of processes, change the others so that the "
    "product stays.)"
)

RETENTION = "retention"
"""Group of settings that say what is measured."""

SHAPE = "the shape of what is tuned"
BEGINNING = "it decided how the run began, and the run is past that"
BASE = "what is tuned belongs to the base as it was then"
ANSWERS = "the base's answers that are replayed were made before the first step"
ASKED = "the base answered so, before the first step; `retention=null` stops measuring"
IMPOSSIBLE = {
    "tune": "it is what the checkpoints hold",
    "prefix.pre_seq_len": SHAPE,
    "prefix.prefix_projection": SHAPE,
    "prefix.gate": SHAPE,
    "lora.rank": SHAPE,
    "lora.targets": SHAPE,
    "prefix.init": BEGINNING,
    "prefix.init_text": BEGINNING,
    "from_scratch": BEGINNING,
    "prefix_path": BEGINNING,
    "adapter_path": BEGINNING,
    "init_from": BEGINNING,
    "model.quantization": BASE,
    "model.quantization_embeddings": BASE,
    "retain.prompts": ANSWERS,
    "retain.max_new_tokens": ANSWERS,
    "preference.loss": "it decided what of the rows is an example",
    "preference.reference": "what answers are measured against was decided before the first step",
    "trainer.optim": "its state in the checkpoints is laid out for that optimizer",
    "trainer.metric_for_best_model": "it chose what `best` holds",
    "retention.target": "it chose what `best` holds",
    "retention.prompts": ASKED,
    "retention.num_prompts": ASKED,
    "retention.max_new_tokens": ASKED,
}
"""Settings that cannot change in the middle of a run, and why."""
SAME_STATE = (
    frozenset({"adamw_torch", "adamw_torch_fused"}),
    frozenset({"adamw_bnb_8bit", "paged_adamw_8bit"}),
)
"""Optimizers that read each other's state."""
CONTINUED_BY = {
    "prefix": "`prefix_path={run} output_dir=NEW` begins a new run with this prefix, also of another length",
    "lora": "`adapter_path={run} output_dir=NEW` begins a new run with this adapter, of the same rank and "
    "targets; else `glmtune export adapter_path={run} output_dir=MERGED` makes a model to tune "
    "(`model.source=MERGED`)",
    "full": "`init_from={run} output_dir=NEW` begins a new run with these weights",
}
"""How a new run begins from what an earlier one tuned, by its `tune`."""


def changed_settings(
    stored: Mapping[str, Any], settings: Mapping[str, Any], *, free: Collection[str] = FREE
) -> list[str]:
    """List the settings that matter and differ, each as ``path: before -> now``.

    A setting that the version of then did not know was off then.

    Args:
        stored: all settings of then, nested.
        settings: all of today.
        free: paths that do not matter.
    """
    return [
        f"`{path}`: {before} then, {now} now" for path, before, now in _differences(stored, settings, free)
    ]


def changes_on_the_way(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """List what `resume=force` changes, where the data lies included: no fingerprint stands for it then."""
    return changed_settings(stored, settings, free=FREE - DATA_PLACES)


def refuse_impossible_changes(stored: Mapping[str, Any], settings: Mapping[str, Any], run: Path) -> None:
    """Refuse settings that no run can change on its way, whatever `resume` says.

    Args:
        stored: all settings that the run began with, nested.
        settings: all of today.
        run: the run folder, for the way out.

    Raises:
        ConfigError: with every such setting, both values, and how to begin anew from what was tuned.
    """
    found = [
        (path, before, now, IMPOSSIBLE[path])
        for path, before, now in _differences(stored, settings, FREE)
        if path in IMPOSSIBLE and not (path == "trainer.optim" and _share_state(before, now))
    ]
    seeds = stored.get("seed"), settings.get("seed")
    if stored.get("from_scratch") and seeds[0] != seeds[1]:
        found.append(("seed", *seeds, "the weights that `from_scratch` began with were drawn by it"))
    if not found:
        return
    # Another way of tuning changes all that belongs to it: said once.
    found = [item for item in found if item[0] == "tune"] or found
    way = CONTINUED_BY[str(stored.get("tune", "prefix"))].format(run=run)
    if found[0][0] == "tune":
        way = "name another `output_dir`" + (
            f"; `model.source={run / 'last'}` tunes this model further"
            if stored.get("tune") == "full"
            else ""
        )
    raise ConfigError(
        f"{run} holds a run with settings that cannot change on its way:\n"
        + "\n".join(f"- `{path}`: {before} then, {now} now ({why})" for path, before, now, why in found)
        + f"\nRepeat them to go on. Or {way}. Or start anew with `resume=never` (the earlier run is kept in "
        "`previous/`)."
    ).see("changed-settings")


def _share_state(before: Any, now: Any) -> bool:
    return any({before, now} <= group for group in SAME_STATE)


def _differences(
    stored: Mapping[str, Any], settings: Mapping[str, Any], free: Collection[str]
) -> list[tuple[str, Any, Any]]:
    before, now = _comparable(stored), _comparable(settings)
    new = [path for path, value in now.items() if path not in before and not value]
    new += [path for path in LEFT_TO_THE_DATA if now.get(path) is None]
    if not (stored.get(RETENTION) and settings.get(RETENTION)):
        # Measuring may begin, or end, on the way: it changes nothing but what chooses `best`.
        new += [path for path in {**before, **now} if path.partition(".")[0] == RETENTION]
        new = [path for path in new if path != f"{RETENTION}.target"]
    return [
        (path, before.get(path), now.get(path))
        for path in {**before, **now}
        if path not in free and path not in new and before.get(path) != now.get(path)
    ]


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Lay settings flat; what says the same in other words becomes the same.

    How a step's rows are shared out does not count, only how many they are; `quantization_bit=4` is `int4`.
    """
    flat = {path: value for path, value in _leaves(settings) if not path.startswith(PLACES)}
    launch = settings.get("launch") or {}
    parts = [launch.get("num_processes") or 1, *(flat.pop(path, None) or 1 for path in ROW_FACTORS)]
    if bits := flat.pop("model.quantization_bit", None):
        flat["model.quantization"] = f"int{bits}"
    if isinstance(sets := flat.get("data.mix"), list):  # where each lies, its fingerprint is compared for
        flat["data.mix"] = [
            {name: value for name, value in each.items() if name not in ("dir", "train_file")}
            for each in sets
        ]
    # A factor from the environment is written as its reference, and compared as that.
    numbers = [part for part in parts if not isinstance(part, str)]
    references = sorted(part for part in parts if isinstance(part, str))
    product = math.prod(numbers)
    return {**flat, ROWS_PER_STEP: " × ".join([str(product), *references]) if references else product}


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def record_changes(run: Path, step: int, changes: Sequence[str]) -> None:
    """Add to the record of a run what changed after a step; what changed after later steps is forgotten.

    `config.yaml` holds the settings of today alone, and so would tell a false story of the steps before.

    Args:
        run: the run folder.
        step: of the checkpoint that the run goes on from; 0 for a run that begins.
        changes: as listed by `changes_on_the_way`; may be empty.
    """
    found = read_changes(run)
    kept = [entry for entry in found if entry["after_step"] <= step and step > 0]
    # The same once more: a kill came between this record and config.yaml, which is written after it.
    is_known = bool(kept) and (kept[-1]["after_step"], kept[-1]["changes"]) == (step, list(changes))
    if changes and not is_known:
        kept.append({"after_step": step, "changes": list(changes)})
    if kept != found:
        write_json(run / CHANGES_FILE, [json_with_checksum(entry) for entry in kept])


def read_changes(run: Path) -> list[dict[str, Any]]:
    """Return when a run's settings changed on its way and how, oldest first.

    Returns:
        Entries of ``after_step`` and ``changes``, a list of words.

    Raises:
        CheckpointError: the record is damaged or cannot be read.
    """
    path = run / CHANGES_FILE
    try:
        found = [checked_json(json.dumps(item)) for item in json.loads(path.read_text(encoding="utf-8"))]
        if not all(isinstance(entry["after_step"], int) for entry in found):
            raise ValueError("an `after_step` is no number")
        return [{**entry, "changes": [str(change) for change in entry["changes"]]} for entry in found]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}), but it tells under which settings this run was made. Restore "
            "the file, or start anew with `resume=never` (the earlier run is kept in `previous/`)."
        ) from error
