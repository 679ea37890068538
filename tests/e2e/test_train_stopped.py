"""A run told to stop, or out of disk space, keeps what it has and says how to go on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.warm.start import warm_python

DRIVER = """
import json, os, resource, signal, sys, time
from pathlib import Path

plan = json.loads(sys.argv[1])
import matplotlib.figure, torch.utils.tensorboard
from glmtune.cli import main
from glmtune.training import trainer


def slowly():
    step = trainer.GlmTrainer.training_step
    trainer.GlmTrainer.training_step = lambda *args, **kwargs: (time.sleep(0.03), step(*args, **kwargs))[1]


def without_space_after_the_first_checkpoint():
    save = trainer.GlmTrainer._save_checkpoint

    def save_then_fill_the_disk(self, *args):
        save(self, *args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    trainer.GlmTrainer._save_checkpoint = save_then_fill_the_disk


def session(overrides, prepare=None, stop_after=None):
    pid = os.fork()
    if pid == 0:
        if prepare:
            prepare()
        code = main(["train", *overrides])
        sys.stderr.flush()
        os._exit(code)
    log = Path(plan["stopped"]) / "trainer_log.jsonl"
    while stop_after and not (log.exists() and f'"step": {stop_after}' in log.read_text()):
        time.sleep(0.02)
    if stop_after:
        os.kill(pid, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


stopped = [*plan["overrides"], "output_dir=" + plan["stopped"]]
full = [*plan["overrides"], "output_dir=" + plan["full"], "trainer.save_steps=4"]
codes = [session(stopped, slowly, stop_after=6), session(stopped)]
codes += [session(full, without_space_after_the_first_checkpoint), session(full)]
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def story(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int], str]:
    """Two runs, each cut short and started again: their folder, exit codes, and what was printed as errors."""
    folder = tmp_path_factory.mktemp("stopped")
    overrides = [
        *("+recipe=ptuning", "data=files", "retention=null", "data.layout=adgen", "prefix.pre_seq_len=4"),
        *(
            "trainer.max_steps=40",
            "trainer.per_device_train_batch_size=2",
            "trainer.gradient_accumulation_steps=1",
        ),
        *("trainer.logging_steps=2", f"model.source={tiny_base}", f"data.train_file={tiny_rows['train']}"),
    ]
    plan = {"overrides": overrides, "stopped": str(folder / "stopped"), "full": str(folder / "full")}
    done = subprocess.run(
        [*warm_python(), "-c", DRIVER, json.dumps(plan)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_sigterm_saves_and_the_same_command_goes_on(story: tuple[Path, list[int], str]) -> None:
    folder, codes, errors = story
    assert codes[:2] == [143, 0], errors
    assert "SIGTERM: stopped after step" in errors
    assert "The same command goes on from there" in errors
    steps = [
        json.loads(line)["step"]
        for line in (folder / "stopped" / "trainer_log.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(2, 41, 2))
    assert (folder / "stopped" / "all_results.json").exists()


def test_full_disk_costs_only_the_steps_after_the_checkpoint(story: tuple[Path, list[int], str]) -> None:
    folder, codes, errors = story
    assert codes[2:] == [1, 0], errors
    assert "checkpoint-8` could not be written" in errors
    assert "checkpoint-4 is intact" in errors
    assert "Traceback" not in errors
    assert "going on from" in errors
    assert (folder / "full" / "checkpoint-40").is_dir()
    assert not [path.name for path in (folder / "full").iterdir() if path.name.startswith(".")]
