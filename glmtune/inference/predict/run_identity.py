"""A prediction run on disk: every answer kept at once, and continued only by the run that began it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glmtune.errors import ConfigError, DataError
from glmtune.files import json_text, write_text_atomically
from glmtune.inference.predict.predictions import (
    IDENTITY_NAME,
    PREDICTIONS_NAME,
    Prediction,
    read_identity,
    read_journal,
)
from glmtune.inference.settings import GenerationSettings

RESULTS_NAME = "predict_results.json"
DECIDING = (
    "model_fingerprint", "prefix_sha256", "adapter_sha256", "template", "dtype", "data_fingerprint",
    "num_rows", "max_source_length", "max_target_length", "source_prefix", "generation",
)  # fmt: skip
"""What a run must share with the rows already there; the rest of the identity is for people."""


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
    return values


def open_journal(folder: Path, identity: RunIdentity, *, resume: str = "auto") -> list[Prediction]:
    """Begin or continue a run in a folder.

    Args:
        folder: made if it is not there; holds the predictions and ``predict_config.json``.
        identity: of this run.
        resume: ``auto`` keeps the rows there, ``never`` deletes them and starts again.

    Returns:
        The rows that are already answered; a half-written last one is dropped.

    Raises:
        ConfigError: the folder cannot be written, or its rows come from another model, prefix, data set or
            generation.
        DataError: the rows there cannot be read.
    """
    path = folder / PREDICTIONS_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if resume == "never":
            for name in (PREDICTIONS_NAME, IDENTITY_NAME, RESULTS_NAME):
                (folder / name).unlink(missing_ok=True)
        done = read_journal(path)
    except OSError as error:
        raise ConfigError(
            f"`output_dir` is `{folder}`, but it cannot be written ({error.strerror or error}). Give a folder"
            " you may write to, with space left."
        ) from error
    _refuse_other_run(path, read_identity(path), identity, num_done=len(done))
    content = json_text(asdict(identity))
    write_text_atomically(folder / IDENTITY_NAME, content)
    foreign = [prediction.row for prediction in done if not 0 <= prediction.row < identity.num_rows]
    if foreign:
        raise DataError(
            f"row {foreign[0]} does not exist: the data has {identity.num_rows} rows. Start again with"
            " `resume=never`.",
            path=path,
        )
    return done


def _refuse_other_run(
    path: Path, there: Mapping[str, Any] | None, identity: RunIdentity, *, num_done: int
) -> None:
    if not num_done:
        return
    way_out = "Continue with the same, choose another `output_dir`, or delete these rows with `resume=never`."
    if there is None:
        raise ConfigError(
            f"{path} holds {num_done} rows, but there is no {IDENTITY_NAME} beside it to tell how they were"
            f" made. {way_out}"
        )
    here = asdict(identity)
    pairs = {
        key: (_shown(there.get(key)), _shown(here[key]))
        for key in DECIDING
        if there.get(key, "") != here[key]
    }
    if pairs:
        differences = "; ".join(f"{key}: {old} there, {new} now" for key, (old, new) in pairs.items())
        raise ConfigError(f"{path} holds {num_done} rows of another run ({differences}). {way_out}")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) != 66 else text[:13] + '..."'
