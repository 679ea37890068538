"""The same command started twice: the second is refused by the name of the first, which is not disturbed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="these tests fork")
# Imports once; then the first of two runs is held up in its middle while the second is started.
DRIVER = """
import json, os, signal, sys, time
from pathlib import Path

import torch.utils.tensorboard, matplotlib.figure, peft
from glmtune import cli
from glmtune.training import trainer
from glmtune.inference.predict import predict
from glmtune.export import export
from glmtune.quantization.files import write
from evaluation.running import runner
from evaluation.compare.reporting import report
import evaluation.compare.build
import recipes.train, recipes.predict, recipes.eval, recipes.compare, recipes.export, recipes.quantize

POINTS = {
    "train": (trainer.GlmTrainer, "training_step"), "predict": (predict, "score_row"),
    "export": (export, "_compare"), "quantize": (write, "_check_written"),
    "eval": (runner, "hash_prompt"), "compare": (evaluation.compare.build, "write_comparison_files"),
}
name, words = sys.argv[1], json.loads(sys.argv[2])
mark = Path(sys.argv[3])


def fork(main):
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 99
    try:
        code = main()
    finally:
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)


def first():
    owner, point = POINTS[name]
    original = getattr(owner, point)

    def held_up(*values, **named):
        mark.touch()
        while not mark.with_name("go").exists():
            time.sleep(0.05)
        return original(*values, **named)

    setattr(owner, point, held_up)
    return cli.main([name, *words])


def code_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


child = fork(first)
while not mark.exists():
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the first ended before its middle"
    time.sleep(0.05)
second = code_of(fork(lambda: cli.main([name, *words])))
listed = sorted(str(path) for path in mark.parent.rglob("*") if "lock" not in path.name)
if sys.argv[4] == "kill":
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
else:
    mark.with_name("go").touch()
    assert code_of(child) in (0, 3, 4)
third = code_of(fork(lambda: cli.main([name, *words])))
print(json.dumps([child, second, third]))
"""


def commands(base: Path, rows: dict[str, Path], place: Path) -> dict[str, list[str]]:
    data = ["data=files", "data.layout=adgen"]
    return {
        "train": [
            *("+recipe=ptuning", "prefix.pre_seq_len=4", *data, f"data.train_file={rows['train']}"),
            *("retention=null", "trainer.max_steps=4", "trainer.save_steps=2", "trainer.logging_steps=1", "trainer.report_to=[]"),
            *("trainer.per_device_train_batch_size=2", f"model.source={base}"),
        ],
        "predict": [
            *data, f"data.test_file={rows['validation']}", "generation.max_new_tokens=2", f"model.source={base}",
        ],
        "export": [f"model.source={base}", "overwrite=true"],
        "quantize": [f"model.source={base}", "overwrite=true", "bits=4"],
        "eval": ["benchmark=ceval", "benchmark.limit=1", "protocol=zero_shot_direct", f"model.source={base}"],
    }  # fmt: skip


@pytest.mark.parametrize("fate", ["finish", "kill"])
@pytest.mark.parametrize(
    "command",
    ["train", *(pytest.param(name, marks=pytest.mark.slow) for name in ("predict", "export", "quantize"))],
)
def test_the_second_is_refused_and_the_third_goes_on(
    command: str, fate: str, tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    if (command, fate) == ("train", "finish"):
        pytest.skip("a run that is finished is not repeated: see the killed one")
    words = [*commands(tiny_base, tiny_rows, tmp_path)[command], f"output_dir={tmp_path / 'out'}"]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, command, json.dumps(words), str(tmp_path / "mark"), fate],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    first, second, third = json.loads(done.stdout.splitlines()[-1])
    assert (second, third) == (2, 0), done.stderr
    assert (
        f"out is being written by another process (process {first} on {socket.gethostname()}, since "
        in done.stderr
    )
    if command == "train":
        steps = [
            json.loads(line)["step"]
            for line in (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()
        ]
        assert steps == [1, 2, 3, 4], "each step once"
