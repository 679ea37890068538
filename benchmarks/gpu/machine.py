"""What this machine is and which versions are installed."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys

import torch

from benchmarks.gpu.worker import GIB, Figures, parse_words

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "torchao",
    "flash-attn",
)


def version(package: str) -> str:
    """Return a package's version, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def printed(*command: str) -> str:
    """Return what a program prints, "?" where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "?"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "?"


def main() -> int:
    """Ask, print, write."""
    options = parse_words(argparse.ArgumentParser(description=__doc__))
    figures = Figures(options.out)
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        figures.add(
            card=torch.cuda.get_device_name(0),
            memory=f"{properties.total_memory / GIB:.1f} GiB",
            capability=".".join(map(str, torch.cuda.get_device_capability(0))),
            cuda=str(torch.version.cuda),
            driver=printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        )
    else:
        figures.add(card="CPU (dry run)")
    figures.add(
        cores=os.cpu_count(),
        python=platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        commit=printed("git", "rev-parse", "--short", "HEAD"),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
