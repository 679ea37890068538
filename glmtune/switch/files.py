"""The file of a rule beside an adapter; a prefix holds its rule in its own file."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from glmtune.errors import CheckpointError
from glmtune.models.checkpoints.headers import records_of
from glmtune.models.checkpoints.shards import OpenShards
from glmtune.storage.files import write_atomically
from glmtune.storage.json_files import parse_json
from glmtune.storage.manifest import check_files
from glmtune.switch.rule import METADATA_KEY, Switch

SWITCH_FILE = "switch.safetensors"


def save_switch(switch: Switch, folder: Path) -> Path:
    """Write ``switch.safetensors`` into an existing folder, complete or not at all.

    Raises:
        OSError: the folder is not writable or the disk is full.
    """
    content = save(switch.tensors(), {METADATA_KEY: switch.described()})
    target = folder / SWITCH_FILE
    write_atomically(target, lambda partial: partial.write_bytes(content))
    return target


def read_switch(folder: Path) -> Switch | None:
    """Read the rule beside an adapter; None where there is none.

    Raises:
        CheckpointError: the file is damaged, or missing though the run that made the folder lists it.
    """
    check_files(folder, (SWITCH_FILE,))
    file = folder / SWITCH_FILE
    if not file.is_file():
        return None
    try:
        with OpenShards() as shards:
            # Sizes in the header are compared with the file's before memory is asked for.
            records = {record.name: record for record in records_of(file, shards.stream(file))}
            tensors: dict[str, Tensor] = {name: shards.read(record) for name, record in records.items()}
        with safe_open(file, framework="pt") as opened:
            facts = parse_json((opened.metadata() or {}).get(METADATA_KEY, "null").encode())
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"The switch in `{file}` cannot be read: {error}. The file is damaged: fetch it again, or take "
            "another checkpoint of the run."
        ) from error
    return Switch.from_file(file, tensors, facts)
