"""What the programs of the parts share: their words, sizes of a real and of a dry run, a file of figures."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_model import Shape

GIB = 2**30
TINY = Shape(layers=2, hidden=256, ffn=512, vocab=6400, heads=8, positions=2048)
"""Of a dry run: widths that every method's groups divide, rows for the ids of glm-tiny's tokenizer."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is computed.

    Attributes:
        shape: of the model.
        prompt: tokens of the long prompt.
        context: tokens held in the long context.
        new: tokens generated.
        rounds: repetitions of which the median counts.
        engine_prompt: tokens of a prompt given to the engine.
        engine_new: tokens of its answers.
    """

    shape: Shape = field(default_factory=Shape)
    prompt: int = 2048
    context: int = 8192
    new: int = 256
    rounds: int = 3
    engine_prompt: int = 128
    engine_new: int = 128


DRY = Sizes(TINY, prompt=64, context=128, new=8, rounds=2, engine_prompt=16, engine_new=8)
SIZES = {False: Sizes(), True: DRY}
"""Dry run or not → sizes."""


class Figures:
    """Figures of a part, printed and written at once, so that a part that is stopped leaves what it has."""

    def __init__(self, out: Path | None) -> None:
        """Begin with nothing; ``out`` is where they are written."""
        self._out, self._found = out, dict[str, Any]()

    def add(self, **found: Any) -> None:
        """Print figures and write all there are."""
        sys.stdout.write("".join(f"{name} = {_shown(value)}\n" for name, value in found.items()))
        sys.stdout.flush()
        self.keep(**found)

    def keep(self, **found: Any) -> None:
        """Write figures and all there were before."""
        self._found |= found
        if self._out is not None:
            partial = self._out.with_suffix(".partial")
            partial.write_text(json.dumps(self._found))
            partial.replace(self._out)


def _shown(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def parse_words(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the words of a part; all have these three."""
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    options = parser.parse_args()
    options.sizes = SIZES[options.dry_run]
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here; add --device cpu")
    torch.manual_seed(0)
    return options


class Peak:
    """Memory of a device since it was made: bytes of tensors, and bytes taken from the device."""

    def __init__(self, device: str) -> None:
        """Begin to count."""
        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    @property
    def tensors(self) -> int:
        """Most bytes of tensors at once; on the CPU most resident bytes of the process so far."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def taken(self) -> int:
        """What `nvidia-smi` would say at the fullest moment: PyTorch's blocks, context and loaded kernels.

        The last two are what the device lacks now beyond PyTorch's blocks, so another process beside this one
        would be counted.
        """
        if self.device != "cuda":
            return self.tensors
        free, total = torch.cuda.mem_get_info()
        return torch.cuda.max_memory_reserved() + (total - free) - torch.cuda.memory_reserved()


def seconds_since(start: float, device: str) -> float:
    """Return the seconds since a moment of `time.perf_counter`, once the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
