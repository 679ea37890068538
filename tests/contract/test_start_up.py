"""What a command imports before its first line: heavy libraries come when they are needed, not before.

Counted, not timed. The first line is the first that the command writes to either stream.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

HEAVY = (
    *("accelerate", "datasets", "deepspeed", "fastapi", "hydra", "jieba", "matplotlib", "nltk", "numpy"),
    *("pandas", "peft", "scipy", "sympy", "tensorboard", "torch", "transformers"),
    *("torch._dynamo", "transformers.modeling_utils", "transformers.trainer"),
)
TEXT = {"hydra", "numpy", "transformers"}  # settings, and tokenizers, which are transformers' without models
SERVER = TEXT | {"fastapi"}
MODEL = TEXT | {"accelerate", "scipy", "sympy", "torch", "torch._dynamo", "transformers.modeling_utils"}
"""transformers' own models import SciPy, SymPy and accelerate, whatever they are asked for."""

EVERY_FIRST_LINE = """
import json, os, sys
heavy, words = json.loads(sys.argv[1]), sys.argv[2:]
class First:
    def __init__(self, stream):
        self.stream = stream
    def write(self, text):
        if text.strip():
            found = [name for name in heavy if name in sys.modules]
            os.write(3, json.dumps([text[:80], found]).encode())
            os._exit(0)
        return len(text)
    def __getattr__(self, name):
        return getattr(self.stream, name)
sys.stdout, sys.stderr = First(sys.stdout), First(sys.stderr)
sys.argv = ["glmtune", *words]
from glmtune.cli import main
main()
"""


def at_first_line(words: list[str], folder: Path) -> tuple[str, set[str]]:
    """Run a command up to its first line, and return that and the heavy modules that are there."""
    reading, writing = os.pipe()
    program = f"import os; os.dup2({writing}, 3)\n{EVERY_FIRST_LINE}"
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    environment.pop("GLMTUNE_DATA", None)
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(HEAVY), *words],
        cwd=folder,
        env=environment,
        pass_fds=(writing,),
        input="1+1\n",
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert said, f"it ended with {done.returncode} before it wrote anything: {done.stderr[-1000:]}"
    line, found = json.loads(said)
    return line, set(found)


CASES: list[tuple[str, set[str], str]] = [
    ("--help", set(), "usage"),
    ("train --help", {"hydra"}, "usage"),
    ("serve --help", {"hydra"}, "usage"),
    ("train +recipe=ptuning output_dir=run", {"hydra"}, "P-Tuning v2 of glm-tiny"),
    ("train +recipe=full deepspeed=zero2 output_dir=run", {"hydra"}, "Tuning of all weights"),
    ("plan +recipe=ptuning model=chatglm2-6b hardware=1x24GB", TEXT, "model"),
    ("data check data=ads", TEXT | {"datasets", "pandas"}, "train"),
    ("serve port=0", SERVER, "http://127.0.0.1"),
    ("train tune=everything", {"hydra"}, "glmtune: `tune` is `everything`"),
    ("eval benchmark=mmluu", {"hydra"}, "glmtune: "),
    ("predict data=ads data.max_predict_samples=1 output_dir=run", MODEL, ""),
]


@pytest.mark.parametrize(("words", "allowed", "first"), [pytest.param(*case, id=case[0]) for case in CASES])
def test_no_more_than_the_first_line_needs(words: str, allowed: set[str], first: str, tmp_path: Path) -> None:
    line, found = at_first_line(words.split(), tmp_path)
    assert line.strip().startswith(first), line
    assert found <= allowed, f"imported before {line!r}: {sorted(found - allowed)}"


def test_the_names_are_those_of_modules() -> None:
    """A misspelt name would be found nowhere, and never be missed."""
    import importlib.util

    there = [name for name in HEAVY if importlib.util.find_spec(name.partition(".")[0])]
    optional = {"deepspeed"}
    assert set(HEAVY) - set(there) <= optional
