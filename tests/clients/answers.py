"""Answers of `glmtune eval` to questions, by a server or by the engine in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes.eval import COMMAND, run
from recipes.words.compose import load_settings

REPO = Path(__file__).resolve().parents[2]
Key = tuple[str, int]
IN_PROCESS = ("model.dtype=float32", "model.device=cpu")


def answers(folder: Path, benchmark: str, *words: str) -> dict[Key, dict[str, Any]]:
    """Evaluate on a sample set and return the answers by subject and index."""
    data = REPO / "data" / f"{benchmark}_sample"
    common = [f"benchmark={benchmark}", f"benchmark.data_dir={data}", f"output_dir={folder}"]
    (done,) = run(load_settings(COMMAND, [*common, *words]))
    lines = (done.folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return {(line["subject"], line["index"]): line for line in map(json.loads, lines)}
