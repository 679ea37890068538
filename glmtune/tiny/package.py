"""Turn a trained run into the embedded model: half precision, official files, into one folder.

``python -m glmtune.tiny.package runs/pretrain_tiny/last glmtune/assets/glm-tiny`` does it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from glmtune.models.checkpoints.writing import save_official
from glmtune.models.load import load_official

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json")


def package(trained: Path, folder: Path) -> int:
    """Write weights in float16, config.json and tokenizer files.

    Args:
        trained: official checkpoint of a finished run.
        folder: where the embedded model lives; its tokenizer files stay if they are there.

    Returns:
        Bytes of all files in ``folder``.
    """
    model = load_official(trained, dtype="float32", device="cpu")
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if not (folder / name).exists():
            shutil.copy(trained / name, folder / name)
    save_official(model, folder, dtype=torch.float16)
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    package(Path(sys.argv[1]), Path(sys.argv[2]))
