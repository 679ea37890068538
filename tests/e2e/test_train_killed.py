"""A run killed with SIGKILL at the worst moments and resumed equals one never stopped, to the last bit."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.warm.start import warm_python

# One process imports everything once and forks a child per session; the child kills itself where asked.
DRIVER = '''
import json, os, signal, sys

import matplotlib.figure, peft, torch.utils.tensorboard

plan = json.loads(sys.argv[1])
from glmtune.storage import files
from glmtune.training import adapt, session, trainer
from glmtune.training.checkpoints import folder
from glmtune.training.measuring import retention as measuring
from recipes.words.compose import load_settings
from recipes.train import COMMAND, run


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(owner, name, *, step=None, after=False):
    """Replace a function by one that kills the process, at a step if given, before or after its work."""
    original = getattr(owner, name)

    def deadly(self, *args, **kwargs):
        current = getattr(getattr(self, "state", None), "global_step", None)
        if not after and (step is None or current == step):
            die()
        result = original(self, *args, **kwargs)
        if after and (step is None or current == step):
            die()
        return result

    setattr(owner, name, deadly)


DEATHS = {
    "when the base has answered": lambda: die_at(measuring.RetentionMeasure, "_ask_base", after=True),
    "before the first checkpoint": lambda: die_at(trainer.GlmTrainer, "_get_grad_norm", step=3),
    "while the tuned model is asked": lambda: die_at(measuring.RetentionMeasure, "_ask_tuned"),
    "between two micro-batches": lambda: die_at(trainer.GlmTrainer, "training_step", step=9, after=True),
    "while a checkpoint is written": lambda: die_at(trainer.GlmTrainer, "_save_rng_state", step=14),
    "before a checkpoint gets its name": lambda: setattr(files, "put_in_place", die),
    "between checkpoint and last": lambda: die_at(folder, "publish"),
    "while best is written": lambda: die_at(trainer.GlmTrainer, "_publish_best", step=16),
    "while last is replaced": lambda: setattr(
        files.Path, "rename", lambda self, target: die() if self.name == ".last.partial" else os.rename(self, target)
    ),
    "after training, before the report": lambda: setattr(session, "report", die),
}


def session_in_child(overrides, death):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if death:
                DEATHS[death]()
            run(load_settings(COMMAND, overrides))
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


codes = {}
for name, part in plan.items():
    codes[name] = [session_in_child(part["overrides"] + ["output_dir=" + part["reference"]], None)]
    for death in [*(part["deaths"] or DEATHS), None]:
        codes[name].append(session_in_child(part["overrides"] + ["output_dir=" + part["killed"]], death))
print(json.dumps(codes))
'''
COMMON = [
    "data=files",
    "data.layout=adgen",
    "trainer.max_steps=22",
    "trainer.per_device_train_batch_size=3",
    "trainer.gradient_accumulation_steps=2",
    "trainer.logging_steps=4",
    "trainer.eval_steps=8",
    "trainer.save_steps=7",
    "trainer.save_total_limit=2",
]
# All that keeps the base's answers together: replay, retention measured, and a switch (of whatever quality).
KEEPING = ["retain=normal", "retain.max_new_tokens=5"]
METHODS = {
    "prefix": [
        *("+recipe=ptuning", "prefix.pre_seq_len=4", "prefix.dropout=0.3", *KEEPING),
        *("prefix.switch=true", "prefix.switch_min_auroc=0"),
    ],
    "lora": [
        *("+recipe=lora", "lora.rank=2", "lora.dropout=0.3", *KEEPING),
        *("lora.switch=true", "lora.switch_min_auroc=0"),
    ],
    "full": ["+recipe=full", "trainer.learning_rate=1e-3", "trainer.gradient_checkpointing=true"],
}


def learnt(log: Path) -> list[dict[str, float]]:
    """The lines of a log without what depends on the clock."""
    clock = ("time", "tokens_per_second", "seconds_per_step", "memory_bytes", "eval_runtime")
    clock += ("eval_retention_runtime",)
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name not in clock} for entry in entries]


@pytest.fixture(scope="module")
def sessions(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[int]], str]:
    """All runs, whole and killed: their folder, exit codes by way of tuning, and what was printed as errors."""
    folder = tmp_path_factory.mktemp("killed")
    prompts = folder / "prompts.jsonl"
    prompts.write_text(
        "\n".join(json.dumps({"prompt": text}) for text in ("你好", "Which fruit?", "3 + 4 = ?"))
    )
    general = folder / "general.jsonl"
    general.write_text("\n".join(json.dumps({"prompt": f"{n} + {n + 3} = ?"}) for n in range(30)))
    plan = {
        tune: {
            "reference": str(folder / tune / "reference"),
            "killed": str(folder / tune / "killed"),
            "deaths": deaths,
            "overrides": [
                *METHODS[tune],
                *([] if tune == "full" else [f"retain.prompts={general}"]),
                *COMMON,
                f"model.source={tiny_base}",
                f"retention.prompts={prompts}",
                "retention.max_new_tokens=6",
                f"data.train_file={tiny_rows['train']}",
                f"data.validation_file={tiny_rows['validation']}",
            ],
        }
        for tune, deaths in (
            ("prefix", None),
            ("lora", ["before a checkpoint gets its name", "while the tuned model is asked"]),
            ("full", ["while a checkpoint is written"]),
        )
    }
    done = subprocess.run(
        [*warm_python(), "-c", DRIVER, json.dumps(plan)],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1]), done.stderr[-3000:]


FILES = {
    "prefix": ["prefix_encoder.safetensors"],
    "lora": ["adapter_model.safetensors", "switch.safetensors"],
    "full": ["model.safetensors"],
}


def tensors(folder: Path, tune: str) -> dict[str, Tensor]:
    return {name: weight for file in FILES[tune] for name, weight in load_file(folder / file).items()}


@pytest.mark.parametrize("tune", ["prefix", "lora", "full"])
def test_killed_and_resumed_equals_never_stopped(
    tune: str, sessions: tuple[Path, dict[str, list[int]], str]
) -> None:
    folder, codes, errors = sessions
    assert codes[tune][0] == codes[tune][-1] == 0, errors
    assert set(codes[tune][1:-1]) == {-9}, (codes, errors)

    reference, killed = folder / tune / "reference", folder / tune / "killed"
    assert learnt(killed / "trainer_log.jsonl") == learnt(reference / "trainer_log.jsonl")
    for name in ("last", "best"):
        before, after = tensors(reference / name, tune), tensors(killed / name, tune)
        assert before.keys() == after.keys()
        assert ("switch.weight" in before) == (tune != "full")
        assert all(bool((before[key] == after[key]).all()) for key in before), name
    kept = {path.name: path.read_bytes() for path in (reference / "retention").iterdir()}
    assert {path.name: path.read_bytes() for path in (killed / "retention").iterdir()} == kept
    replayed = {"retain.jsonl"} if tune != "full" else set()
    measured = {"base.jsonl", "base.safetensors", "step-8.jsonl", "step-16.jsonl", "step-22.jsonl"}
    assert set(kept) == measured | replayed
    results = [json.loads((run / "all_results.json").read_text()) for run in (reference, killed)]
    for name in ("switch", "switched_eval_loss", "final_eval_retention_switched_off"):
        assert (name in results[0]) == (tune != "full")
        assert results[0].get(name) == results[1].get(name)
    assert not [path.name for path in killed.iterdir() if path.name.startswith(".")]
    assert sorted(path.name for path in killed.glob("checkpoint-*")) == ["checkpoint-21", "checkpoint-22"]
