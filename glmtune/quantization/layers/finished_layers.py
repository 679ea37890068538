"""Layers quantized so far, on disk, so that a run that was killed goes on with the next one.

Quantizing a 6B model takes minutes, with GPTQ hours. Every layer becomes a file as soon as it is done::

    .NAME.parts/                                      beside the output folder NAME
        identity.json                                 source files, method, settings, version
        transformer.encoder.layers.0....safetensors   codes and scales; signal and noise in its metadata

Files appear whole (written aside, then renamed), so whatever is there after a kill is good. The identity
decides whether it may be used: if anything that has a say in the codes differs, the folder is emptied. When
the result is in its place the folder is removed; so it is after an error of ours, which the next run would
only meet again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glmtune.storage.files import write_atomically, write_text_atomically

IDENTITY_FILE = "identity.json"
SIGNS = "signs/"
"""Begins the keys of sampled signs, which share the file with the tensors of the layer."""


@dataclass(frozen=True, slots=True)
class FinishedLayer:
    """One quantized layer with its share of the report and of the fingerprint.

    Attributes:
        tensors: by the maker's names.
        signal: energy of what was approximated; see `QuantizedRows`.
        noise: energy of the difference.
        signs: native name → what `sampled_signs` returned for the weight.
    """

    tensors: dict[str, Tensor]
    signal: float
    noise: float
    signs: dict[str, bytes]


class FinishedLayers:
    """A folder with a file per layer; each appears whole or not at all.

    Attributes:
        num_reused: layers taken over from an earlier run.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Go on with what is there, or begin anew if that is another run's.

        Args:
            folder: created if absent.
            identity: everything that decides how layers are quantized, as JSON values.
        """
        self._folder, self.num_reused = folder, 0
        text = json.dumps(identity, sort_keys=True)
        file = folder / IDENTITY_FILE
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            self.discard()
            folder.mkdir(parents=True)
            write_text_atomically(file, text)

    def get(self, name: str) -> FinishedLayer | None:
        """Return a layer that an earlier run finished, None where there is none."""
        file = self._folder / f"{name}.safetensors"
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                found = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
                metadata = opened.metadata() or {}
        except SafetensorError:  # a damaged disk; the layer is quantized again
            return None
        signs = {
            key.removeprefix(SIGNS): found.pop(key).numpy().tobytes()
            for key in list(found)
            if key.startswith(SIGNS)
        }
        self.num_reused += 1
        return FinishedLayer(found, float(metadata["signal"]), float(metadata["noise"]), signs)

    def put(self, name: str, layer: FinishedLayer) -> None:
        """Keep a layer."""
        # `repr` keeps every bit of a float.
        metadata = {
            "signal": repr(layer.signal),
            "noise": repr(layer.noise),
        }
        tensors = {key: value.detach().cpu().contiguous() for key, value in layer.tensors.items()}
        for key, sampled in layer.signs.items():
            tensors[SIGNS + key] = torch.frombuffer(bytearray(sampled), dtype=torch.uint8)
        file = self._folder / f"{name}.safetensors"
        write_atomically(file, lambda path: save_file(tensors, path, metadata=metadata))

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)


def weight_files_identity(files: list[Path]) -> list[list[Any]]:
    """Return name, size and time of change of files, by which a replaced file is noticed.

    Hashing 12 GB would take longer than quantizing some layers again.
    """
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
