"""Every command of the READMEs, and of the pages a newcomer follows, runs, on a smaller job.

Of all other pages `test_site_commands.py` composes the commands.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm.start import warm_python

REPO = Path(__file__).resolve().parents[2]
# In this order, in one folder: later pages use what earlier ones wrote. A command runs where it stands first.
PAGES = (
    "README.md",
    "docs/start/tiny.md",
    "docs/start/one_card.md",
    "docs/howto/own_data.md",
    "docs/howto/abilities.md",
    "docs/howto/int4.md",
    "docs/howto/export.md",
    "docs/howto/several_gpus.md",
    "docs/howto/evaluate.md",
)
# What makes a command of the README small enough for a test, without changing its path through the code.
SMALL = {
    "train": [
        "retention.num_prompts=8",
        "retention.max_new_tokens=8",
        "trainer.max_steps=2",
        "data.max_train_samples=32",
        "data.max_eval_samples=8",
    ],
    "predict": ["data.max_predict_samples=4", "generation.max_new_tokens=8"],
    "eval": ["benchmark.limit=1", "num_threads=1"],
    "compare": ["benchmark.limit=2", "num_threads=1"],
    "dial": ["strengths=[0,1]", "retention.num_prompts=8", "data.max_eval_samples=8"],
}
# A comparison's exit code is its verdict, a plan's whether it fits.
DONE = {"compare": (0, 3, 4), "plan": (0, 3)}
# These are run by CI itself, or only change the shell.
ELSEWHERE = ("bash scripts/test.sh", "bash scripts/setup.sh", "source ")
# Only composed: those before them take the same way, and these would take minutes together.
COMPOSED = ("torchrun ", "glmtune compare benchmark=exam ")
# They run until they are told to end: see test_readme_talk.py.
LONG_RUNNING = ("glmtune chat", "glmtune serve", "glmtune web")


def commands(readme: str) -> list[str]:
    text = (REPO / readme).read_text(encoding="utf-8")
    lines: list[str] = []
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.DOTALL):
        lines += [line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    return [re.sub(r"\s+", " ", line) for line in lines if line and not line.startswith("#")]


def test_both_readmes_hold_the_same_commands() -> None:
    assert commands("README.md") == commands("README.zh.md")


def test_first_screen_has_exactly_two_commands() -> None:
    first = re.search(r"```bash\n(.*?)```", (REPO / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert first is not None
    assert [line.split("  #")[0].strip() for line in first[1].strip().splitlines()] == [
        "bash scripts/quickstart.sh",
        "bash scripts/test.sh",
    ]


def test_python_examples_run(tmp_path: Path) -> None:
    examples = re.findall(
        r"```python\n(.*?)```", (REPO / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert examples
    for example in examples:
        code = re.sub(r'"(THUDM|zai-org)/[^"]+"', '"glm-tiny"', example)
        code = re.sub(r', prefix="[^"]+"', "", code)
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's commands run one after the other, with a little data in the places it names."""
    folder = tmp_path_factory.mktemp("readme")
    adgen = folder / "AdvertiseGen"
    adgen.mkdir()
    for source, name in (("train", "train.json"), ("dev", "dev.json")):
        lines = (REPO / "data" / "ads" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()[:40]
        (adgen / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.copy(adgen / "train.json", folder / "my_train.json")
    shutil.copy(adgen / "dev.json", folder / "my_dev.json")
    shutil.copytree(REPO / "data" / "own_benchmark", folder / "data" / "own_benchmark")
    return folder


RUN = list(
    dict.fromkeys(
        line
        for page in PAGES
        for line in commands(page)
        if not line.startswith((*ELSEWHERE, *LONG_RUNNING, *COMPOSED))
    )
)


# What a command imports by itself shows where nothing was imported before, so its first line starts a process.
FIRST = list({" ".join(line.split()[:2]): line for line in reversed(RUN)}.values())


def test_there_are_commands() -> None:
    assert len(RUN) > 35


@pytest.mark.parametrize("line", RUN, ids=[f"{n}-{line.split()[1]}" for n, line in enumerate(RUN)])
def test_command_runs(line: str, workplace: Path) -> None:
    """Run one command; they stand in the pages' order, and later ones use what earlier ones wrote."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SKIP_SETUP": "1",
        "OMP_NUM_THREADS": "1",
        "RUN": str(workplace / "quickstart"),
        "OUTPUT_DIR": str(workplace / "full"),
        "VIRTUAL_ENV": str(Path(sys.executable).parents[1]),
    }
    words = [re.sub(r"^model=(?!glm-tiny).*", "model=glm-tiny", word) for word in shlex.split(line)]
    command = words[1]
    if words[0] == "glmtune":
        words += SMALL.get(command, [])
        words += ["retention.exam_limit=1"] * ("retention.exam=exam" in words)
        words += ["retain.max_new_tokens=8"] * ("retain=normal" in words)
        words[:1] = ["glmtune"] if line in FIRST else [*warm_python(), "-m", "glmtune"]
    elif command in ("scripts/quickstart.sh", "scripts/ds_train_finetune.sh"):
        words += SMALL["train"]
    cwd = REPO if words[0] == "bash" else workplace
    done = subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode in DONE.get(command, (0,)), f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
