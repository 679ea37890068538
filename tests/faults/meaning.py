"""What the files of a run mean: tensors, answers and numbers, without what depends on the clock.

Two runs are the same if `differences` finds nothing: tensors to the last bit, JSON without times, everything else byte
by byte. `half_written` finds what no reader may ever see under its final name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

CLOCK = re.compile(r"seconds|^time$|runtime|per_second|memory_bytes|num_resumed|checksum|digest|xxh|blake")
"""In the names of values that no two runs share: times, what one session did and held, sums over files with such."""
# What is said about the run itself: the locks' holders, TensorBoard's events with their times, how long answers took;
# and what was set aside, which is kept and is no result; lines that were damaged are set aside, too.
NOT_COMPARED = re.compile(r"(\.lock|timing\.json|\.damaged)$|tfevents|(^|/)environment\.json$|(^|/)previous/")
DAMAGE_ALERT = "damaged_checkpoint"
"""A line of a training log that says what was damaged; it is in no undisturbed log."""
TENSORS = frozenset({".pt", ".pth", ".bin"})
JOURNAL = re.compile(r"(^|/)journal.*\.jsonl$")
"""Answers in the order in which they came, which starting anew may change."""


def meaning(folder: Path) -> dict[str, Mapping[str, str]]:
    """Return by file what is in it: parts by name, as text that can be compared.

    Args:
        folder: all visible files below it count; hidden ones are on their way to somewhere.
    """
    files = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    return {
        name: _parts(name, path)
        for name, path in files.items()
        if not is_hidden(name) and not NOT_COMPARED.search(name)
    }


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it lies in, is hidden."""
    return any(part.startswith(".") for part in name.split("/"))


def differences(
    expected: Mapping[str, Mapping[str, str]], found: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """List what two meanings do not share, as ``file: part``."""
    listed = [f"{name}: missing" for name in expected if name not in found]
    listed += [f"{name}: should not be there" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        before, now = expected[name], found[name]
        parts = [part for part in {**before, **now} if before.get(part) != now.get(part)]
        listed += [
            f"{name}: {part}: {str(before.get(part))[:80]} -> {str(now.get(part))[:80]}" for part in parts
        ]
    return sorted(listed)


def half_written(folder: Path) -> list[str]:
    """List the visible files that are no whole file of their kind, and checkpoints that lack what they list."""
    found: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if is_hidden(name) or not path.is_file() or NOT_COMPARED.search(name):
            continue
        try:
            _read(path)
            if path.name == "checkpoint.json":
                _check_manifest(path)
        except (ValueError, OSError, RuntimeError, SafetensorError) as error:
            found.append(f"{name}: {error}")
    return found


def achieved(folder: Path) -> dict[str, int]:
    """Count what must not become less when a run is killed once more: steps that are saved, and answers."""
    counts: dict[str, int] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if is_hidden(name):
            continue
        if path.name == "checkpoint.json" and path.parent.name.startswith("checkpoint-"):
            run = f"newest step in {path.parent.parent.name}"
            counts[run] = max(counts.get(run, 0), int(path.parent.name.rpartition("-")[2]))
        elif JOURNAL.search(name) or path.name == "generated_predictions.jsonl":
            counts[f"answers in {name}"] = path.read_bytes().count(b"\n")
    return counts


def leftovers(folder: Path) -> list[str]:
    """List hidden files that a finished run should have cleared away."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob(".*")]
    return [name for name in names if re.search(r"\.(partial|replaced|parts)$|/?\.tmp[^/]*$", name)]


def _check_manifest(path: Path) -> None:
    for name, about in json.loads(path.read_text(encoding="utf-8"))["files"].items():
        size = about if isinstance(about, int) else about["size"] if isinstance(about, dict) else None
        place = path.parent / name
        # `last` and `best` keep the manifest of their checkpoint, without the files that only resuming needs.
        if path.parent.name.startswith("checkpoint-") and not place.is_file():
            raise ValueError(f"{name} is missing")
        if size is not None and place.is_file() and place.stat().st_size != size:
            raise ValueError(f"{name} has another size")


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in TENSORS:
        return torch.load(path, weights_only=False)  # written here a moment ago, so no code of others
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".jsonl":
        # The last one may be torn, in the middle of a character too.
        *lines, _ = path.read_bytes().split(b"\n")
        return [json.loads(line) for line in lines]
    return None


def _parts(name: str, path: Path) -> dict[str, str]:
    try:
        value = _read(path)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        return {"damaged": str(error)}
    if value is None:
        return {"bytes": _hash(path.read_bytes())}
    if isinstance(value, list):
        told = [line for line in value if not (isinstance(line, dict) and line.get("alert") == DAMAGE_ALERT)]
        lines = [json.dumps(_without_clock(line), sort_keys=True, ensure_ascii=False) for line in told]
        if JOURNAL.search(name):
            lines.sort()
        return {f"line {number}": line for number, line in enumerate(lines, start=1)}
    if path.name == "checkpoint.json" and isinstance(value, dict):
        value = {**value, "files": sorted(value["files"])}  # sizes hang on the digits of times
    if path.name == "adapter_config.json" and isinstance(value, dict):
        # A set: each process has its order.
        value = {
            **value,
            "target_modules": sorted(value["target_modules"]),
        }
    return dict(_leaves(value, ""))


def _leaves(value: Any, path: str) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items() if not CLOCK.search(str(key))]
    elif isinstance(value, list | tuple):
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        if isinstance(value, torch.Tensor):
            plain = value.detach().contiguous().reshape(-1).view(torch.uint8) if value.numel() else value
            return [(path, f"{value.dtype} {tuple(value.shape)} {_hash(plain.numpy().tobytes())}")]
        return [(path, repr(value))]
    return [leaf for key, item in items for leaf in _leaves(item, f"{path}/{key}")]


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_clock(item) for key, item in value.items() if not CLOCK.search(key)}
    return [_without_clock(item) for item in value] if isinstance(value, list) else value


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
