"""The folder of a prediction run, which only the run that began it may continue."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glmtune.errors import DataError
from glmtune.inference.predict.predictions import (
    IDENTITY_NAME,
    PREDICTIONS_NAME,
    Prediction,
    identity_beside,
    parse_prediction,
    refuse_twins,
)
from glmtune.inference.settings import GenerationSettings
from glmtune.storage.checksums import json_with_checksum
from glmtune.storage.files import json_text, write_error, write_text_atomically
from glmtune.storage.journal import Journal, make_run_folder, refuse_other_run

LOGGER = logging.getLogger(__name__)
RESULTS_NAME = "predict_results.json"
BASE_FOLDER = "base"
"""In the folder of a run: the same questions answered without what was tuned."""
DEFAULTS = {"prefix_strength": 1.0, "adapter_scale": 1.0, "use_switch": True}
"""Parts of the identity that a run does not name which was begun before there was a choice."""
DECIDING = (
    "model_fingerprint", "prefix_sha256", "adapter_sha256", *DEFAULTS, "template", "dtype",
    "data_fingerprint", "num_rows", "max_source_length", "max_target_length", "source_prefix", "generation",
)  # fmt: skip
"""What a run must share with the rows already there.

The rest of the identity is for people: a model that was renamed or data that was moved give the same answers.
"""

DRAWING = 2
"""How sampled answers come from seed and row: under another number the same seed gives other answers, and
rows of both must not be mixed. 1 (its runs do not name it): drawn in transformers' `generate`; 2: the engine.
"""


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What makes the answers of a run what they are.

    Attributes:
        model: what the base was called.
        model_fingerprint: of its weights.
        template: name of the prompt template.
        dtype: floating type of the model.
        data: file or hub id of the rows.
        split: ``train``, ``validation`` or ``test``.
        data_fingerprint: of the rows.
        num_rows: rows to answer.
        max_source_length: limit of a prompt, in tokens.
        max_target_length: limit of a reference, in tokens.
        source_prefix: text in front of every prompt.
        generation: the settings that change answers (not the batch sizes).
        glmtune_version: version that began the run.
        prefix: file of the prefix, empty without one.
        prefix_sha256: of that file, empty without one.
        pre_seq_len: length of the prefix, 0 without one.
        adapter: folder of the LoRA adapter, empty without one.
        adapter_sha256: of its files, empty without one.
        prefix_strength: how much the prefix counted.
        adapter_scale: what the adapter was multiplied by.
        use_switch: False where a switch that is there was ignored.
    """

    model: str
    model_fingerprint: str
    template: str
    dtype: str
    data: str
    split: str
    data_fingerprint: str
    num_rows: int
    max_source_length: int
    max_target_length: int
    source_prefix: str
    generation: Mapping[str, Any]
    glmtune_version: str
    prefix: str = ""
    prefix_sha256: str = ""
    pre_seq_len: int = 0
    adapter: str = ""
    adapter_sha256: str = ""
    prefix_strength: float = 1.0
    adapter_scale: float = 1.0
    use_switch: bool = True


def deciding_settings(settings: GenerationSettings) -> dict[str, Any]:
    """Return the generation settings that change answers.

    Args:
        settings: all of them; batch sizes do not change answers, sampling values only with sampling.
    """
    values: dict[str, Any] = {
        name: getattr(settings, name)
        for name in ("do_sample", "num_beams", "repetition_penalty", "max_new_tokens")
    }
    if settings.kv_cache != "plain":  # runs begun before there was a choice do not name it
        values["kv_cache"] = settings.kv_cache
    if settings.do_sample:
        temperature, top_k, top_p = settings.sampling
        values |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": settings.seed}
        values["drawing"] = DRAWING
    return values


def open_journal(folder: Path) -> Journal:
    """Make the folder of a run and lock its predictions file; a context manager.

    Raises:
        ConfigError: the folder cannot be written, holds something else, or is that of another process.
    """
    make_run_folder(folder, _is_predictions, result="predictions")
    return Journal(folder / PREDICTIONS_NAME)


def _is_predictions(folder: Path) -> bool:
    # The untuned base answers first, into a folder inside.
    return any(
        (place / IDENTITY_NAME).is_file() or _begins_as_ours(place / PREDICTIONS_NAME)
        for place in (folder, folder / BASE_FOLDER)
    )


def _begins_as_ours(predictions: Path) -> bool:
    """Say whether a file of that name, which other tools write too, has a row of ours first."""
    try:
        with predictions.open("rb") as file:
            parse_prediction(file.readline().decode("utf-8-sig"))
    except (OSError, ValueError):
        return False
    return True


def answered_rows(journal: Journal, identity: RunIdentity, *, resume: str = "auto") -> list[Prediction]:
    """Begin or continue a run, and keep its identity as ``predict_config.json``.

    Args:
        journal: of the run, see `open_journal`.
        identity: of this run.
        resume: ``auto`` keeps the rows there, ``never`` deletes them and starts again.

    Returns:
        The rows that are already answered; a half-written last one is dropped, damaged ones set aside.

    Raises:
        ConfigError: the rows there come from another model, prefix, data set or generation.
        DataError: the rows there answer a row twice, or one that the data does not have.
    """
    path = journal.path
    if resume == "never":
        try:
            for name in (PREDICTIONS_NAME, IDENTITY_NAME, RESULTS_NAME):
                path.with_name(name).unlink(missing_ok=True)
        except OSError as error:
            raise write_error(path, error) from error
    content = journal.repair(parse_prediction)
    for note in content.notes(path):
        LOGGER.warning("%s", note)
    done = content.entries
    refuse_twins(done, path)
    if done:
        there, here = identity_beside(path), asdict(identity)
        refuse_other_run(
            path,
            f"{len(done)} rows",
            # A run begun before there were adapters, strengths or switches does not name one.
            None if there is None else {name: there.get(name, DEFAULTS.get(name, "")) for name in DECIDING},
            {name: here[name] for name in DECIDING},
            identity_name=IDENTITY_NAME,
            way_out="Continue with the same, choose another `output_dir`, or delete these rows with"
            " `resume=never`.",
        )
    write_text_atomically(path.with_name(IDENTITY_NAME), json_text(json_with_checksum(asdict(identity))))
    foreign = [prediction.row for prediction in done if not 0 <= prediction.row < identity.num_rows]
    if foreign:
        raise DataError(
            f"row {foreign[0]} does not exist: the data has {identity.num_rows} rows. Start again with"
            " `resume=never`.",
            path=path,
        )
    return done
