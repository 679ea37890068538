"""`resume=force` with other settings: what can change is used from the next step on, the rest is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glmtune.errors import CheckpointError, ConfigError
from glmtune.prefix.attach import prefix_of
from glmtune.training.log import read_log
from glmtune.training.session import train
from glmtune.training.starting.changes import CHANGES_FILE, read_changes, record_changes
from glmtune.training.trainer import GlmTrainer
from recipes.train import COMMAND, TrainResult, run
from recipes.words.compose import load_settings

MakeTrainer = Callable[..., GlmTrainer]
FIRST: dict[str, Any] = {
    "max_steps": 4,
    "save_steps": 2,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
}


def rates(run_folder: Path) -> list[float]:
    return [entry["learning_rate"] for entry in read_log(run_folder) if "loss" in entry]


def resumed(make_trainer: MakeTrainer, **values: Any) -> tuple[GlmTrainer, dict[str, Any]]:
    """Two steps with the first settings, then two with others; what the optimizer's first group holds at the end."""
    first = make_trainer(**FIRST)
    if not (first.run_folder / "checkpoint-2").exists():
        train(first, None)
    trainer = make_trainer(**{**FIRST, **values})
    train(trainer, trainer.run_folder / "checkpoint-2")
    assert trainer.state.global_step == trainer.args.max_steps
    return trainer, trainer.plain_optimizer.param_groups[0]


TOLD = [
    ("learning_rate", 0.01, "lr", 0.01),
    ("learning_rate", 0.01, "initial_lr", 0.01),
    ("weight_decay", 0.5, "weight_decay", 0.5),
    ("adam_beta1", 0.5, "betas", (0.5, 0.999)),
    ("adam_beta2", 0.9, "betas", (0.9, 0.9)),
    ("adam_epsilon", 1e-3, "eps", 1e-3),
    ("optim", "adamw_torch_fused", "fused", True),
]


def test_the_optimizer_has_todays_settings(make_trainer: MakeTrainer) -> None:
    same = prefix_of(resumed(make_trainer)[0].tuned.model).embedding.weight.detach().clone()
    for setting, value, key, held in TOLD:
        trainer, group = resumed(make_trainer, **{setting: value})
        assert group[key] == held, setting
        after = prefix_of(trainer.tuned.model).embedding.weight.detach()
        used = not torch.allclose(same, after, rtol=1e-6)
        assert used or setting == "optim", f"{setting} is held, but not used"


def test_the_log_shows_the_new_rate_and_the_weights_move_less(make_trainer: MakeTrainer) -> None:
    def moved(trainer: GlmTrainer) -> float:
        start = load_file(trainer.run_folder / "checkpoint-2" / "prefix_encoder.safetensors")[
            "embedding.weight"
        ]
        return float((prefix_of(trainer.tuned.model).embedding.weight.detach() - start).norm())

    same, _ = resumed(make_trainer)
    far = moved(same)
    slower, _ = resumed(make_trainer, learning_rate=0.001)
    assert rates(slower.run_folder) == [0.1, 0.1, 0.001, 0.001]
    assert moved(slower) == pytest.approx(far / 100, rel=0.02)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"lr_scheduler_type": "linear"}, [0.1 * 2 / 4, 0.1 * 1 / 4]),
        ({"lr_scheduler_type": "linear", "max_steps": 6}, [0.1 * rest / 6 for rest in (4, 3, 2, 1)]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4}, [0.1 * 2 / 4, 0.1 * 3 / 4]),
        ({"lr_scheduler_type": "linear", "learning_rate": 0.2}, [0.2 * 2 / 4, 0.2 * 1 / 4]),
    ],
)
def test_the_schedule_is_todays_at_its_step(
    make_trainer: MakeTrainer, values: dict[str, Any], expected: list[float]
) -> None:
    trainer, _ = resumed(make_trainer, **values)
    assert rates(trainer.run_folder)[2:] == pytest.approx(expected)


def test_a_run_with_the_same_settings_is_the_very_same(make_trainer: MakeTrainer) -> None:
    values = {**FIRST, "lr_scheduler_type": "cosine", "warmup_steps": 1, "weight_decay": 0.1}
    whole = make_trainer(folder="whole", **values)
    train(whole, None)
    again = make_trainer(folder="again", **values)
    train(again, whole.run_folder / "checkpoint-2")
    assert torch.equal(
        prefix_of(whole.tuned.model).embedding.weight, prefix_of(again.tuned.model).embedding.weight
    )


def small(base: Path, rows: dict[str, Path], output: Path) -> list[str]:
    """Overrides of four steps with two checkpoints."""
    return [
        *("data=files", "data.layout=adgen", f"model.source={base}", f"output_dir={output}"),
        *(f"data.train_file={rows['train']}", f"data.validation_file={rows['validation']}"),
        *(
            "retention=null",
            "trainer.max_steps=4",
            "trainer.save_steps=2",
            "trainer.logging_steps=1",
            "trainer.report_to=[]",
        ),
        *("trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=1"),
    ]


@pytest.fixture
def words(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path) -> list[str]:
    return small(tiny_base, tiny_rows, tmp_path / "run")


PREFIX = ["+recipe=ptuning", "prefix.pre_seq_len=4", "prefix.prefix_projection=false"]
LORA = ["+recipe=lora", "lora.rank=2"]


def trained(*words: str) -> TrainResult:
    return run(load_settings(COMMAND, words))


def output_of(words: list[str]) -> Path:
    return Path(next(word for word in words if word.startswith("output_dir=")).partition("=")[2])


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """The words of a finished run of each recipe; what is refused leaves it as it is."""
    found = {}
    for recipe in (PREFIX, LORA):
        found[recipe[0]] = [
            *recipe,
            *small(tiny_base, tiny_rows, tmp_path_factory.mktemp("finished") / "run"),
        ]
        trained(*found[recipe[0]])
    return found


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        (PREFIX, ["prefix.pre_seq_len=6"], ["`prefix.pre_seq_len`: 4 then, 6 now", "`prefix_path="]),
        (PREFIX, ["prefix.prefix_projection=true"], ["`prefix.prefix_projection`: False then, True now"]),
        (PREFIX, ["prefix.init=zero"], ["`prefix.init`: random then, zero now"]),
        (
            PREFIX,
            ["tune=lora", "prefix=null", "+lora.rank=2"],
            ["`tune`: prefix then, lora now", "`output_dir`"],
        ),
        (PREFIX, ["trainer.optim=sgd"], ["`trainer.optim`: adamw_torch then, sgd now", "`prefix_path="]),
        (PREFIX, ["model.quantization=int8"], ["`model.quantization`: None then, int8 now"]),
        (PREFIX, ["quantization_bit=4"], ["`model.quantization`: None then, int4 now"]),
        (PREFIX, ["trainer.metric_for_best_model=accuracy"], ["`trainer.metric_for_best_model`"]),
        (PREFIX, ["prefix_path=elsewhere"], ["`prefix_path`: None then, elsewhere now"]),
        (LORA, ["lora.rank=4"], ["`lora.rank`: 2 then, 4 now", "`adapter_path=", "model.source=MERGED"]),
        (LORA, ["lora.targets=[o_proj]"], ["`lora.targets`: None then, ['o_proj'] now"]),
    ],
)
def test_what_cannot_change_is_refused_by_name_and_nothing_is_touched(
    finished: dict[str, list[str]], recipe: list[str], changes: list[str], said: list[str]
) -> None:
    words = finished[recipe[0]]
    folder = output_of(words).parent
    before = snapshot(folder)
    for resume in ("force", "auto"):
        with pytest.raises(ConfigError) as caught:
            trained(*words, *changes, f"resume={resume}")
        for word in said:
            assert word in str(caught.value), str(caught.value)
    assert snapshot(folder) == before


def test_what_changed_is_said_and_kept(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(*PREFIX, *words)
    more = ["trainer.learning_rate=1e-3", "trainer.max_steps=6", "trainer.lr_scheduler_type=constant"]
    capsys.readouterr()
    results = trained(*PREFIX, *words, *more, "resume=force").results
    said = [line for line in capsys.readouterr().err.splitlines() if "with other settings" in line]
    assert len(said) == 1
    assert "`trainer.learning_rate`: 0.02 then, 0.001 now" in said[0]
    assert rates(tmp_path / "run")[4:] == [0.001, 0.001]
    (entry,) = results["changed_settings"]
    assert entry["after_step"] == 4
    assert any("0.02 then, 0.001 now" in change for change in entry["changes"])
    card = (tmp_path / "run" / "README.md").read_text()
    assert "0.02 then, 0.001 now" in card
    # The very command that would have been refused before goes on (and finds the run finished).
    assert trained(*PREFIX, *words, *more).steps == 6


def test_other_rows_and_other_numbers_of_them(
    words: list[str], tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    """Of a run of few rows, a step after the change takes the rows of today's file, as many as today's batch."""
    first = trained(*PREFIX, *words, "trainer.max_steps=2")
    manifest = json.loads((first.output_dir / "checkpoint-2" / "checkpoint.json").read_text())
    (first.output_dir / "all_results.json").unlink()  # as if killed before the report
    copy = shutil.copytree(first.output_dir, tmp_path / "copy")
    where = [f"output_dir={copy}", f"data.train_file={tiny_rows['validation']}"]
    with pytest.raises(ConfigError, match=r"another data fingerprint.*resume=force"):
        trained(*PREFIX, *words, "trainer.max_steps=2", *where)
    other = [f"data.train_file={tiny_rows['validation']}", "trainer.per_device_train_batch_size=2"]
    done = trained(*PREFIX, *words, *other, "resume=force", "seed=7")
    changed = json.loads((done.output_dir / "checkpoint-4" / "checkpoint.json").read_text())
    assert (manifest["rows_per_step"], changed["rows_per_step"]) == (4, 2)
    assert (manifest["rows_grouped"], changed["rows_grouped"]) == (4, 2)
    assert (manifest["seed"], changed["seed"]) == (42, 7)
    assert manifest["data_fingerprint"] != changed["data_fingerprint"] == done.results["data_fingerprint"]
    assert done.results["train_path"] == str(tiny_rows["validation"])
    assert "data.train_file" in json.dumps(done.results["changed_settings"])


def test_another_seed_draws_other_numbers(make_trainer: MakeTrainer) -> None:
    """Order of rows and dropout both follow it, and a second start at the same place repeats them."""
    values = {**FIRST, "shuffle": False}  # the order stays, so what differs is dropout

    def end(seed: int) -> torch.Tensor:
        trainer = make_trainer(**values)
        prefix_of(trainer.tuned.model).dropout = 0.5
        trainer.args.seed = seed
        train(trainer, trainer.run_folder / "checkpoint-2" if seed else None)
        return prefix_of(trainer.tuned.model).embedding.weight.detach().clone()

    end(0)
    assert torch.equal(end(7), end(7))
    assert not torch.equal(end(7), end(8))


def test_fewer_steps_than_done_are_refused(make_trainer: MakeTrainer) -> None:
    first = make_trainer(**FIRST)
    train(first, None)
    with pytest.raises(ConfigError, match=r"`trainer.max_steps` is 3.*already at step 4.*resume="):
        train(make_trainer(**{**FIRST, "max_steps": 3}), first.run_folder / "checkpoint-4")
    shorter = make_trainer(**{**FIRST, "max_steps": 2})
    train(shorter, first.run_folder / "checkpoint-2")
    assert shorter.state.global_step == 2, "nothing is left to train"


@pytest.mark.parametrize(
    ("recipe", "other", "said"),
    [
        (
            PREFIX,
            [*PREFIX[:1], "prefix.pre_seq_len=6"],
            r"a prefix of 4 positions.*of 6 positions.*prefix_path",
        ),
        (LORA, [*LORA[:1], "lora.rank=4"], r"`lora.rank` is another"),
        (LORA, [*LORA, "lora.targets=[o_proj]"], r"does not fit the model: \d+ tensors are missing"),
        (PREFIX, LORA, r"adapter_model.safetensors cannot be read"),
        (LORA, ["+recipe=full"], r"holds no weights"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused_without_settings(
    finished: dict[str, list[str]], tmp_path: Path, recipe: list[str], other: list[str], said: str
) -> None:
    """`resume=PATH` may name a checkpoint that has left its run folder, and so the settings of then."""
    folder = tmp_path / "moved"
    shutil.copytree(output_of(finished[recipe[0]]) / "checkpoint-2", folder / "checkpoint-2")
    words = [word for word in finished[recipe[0]][len(recipe) :] if not word.startswith("output_dir=")]
    with pytest.raises(CheckpointError, match=said):
        trained(*other, *words, f"output_dir={tmp_path / 'run'}", f"resume={folder / 'checkpoint-2'}")


def test_a_rate_set_by_hand_is_not_lowered_by_earlier_rollbacks(make_trainer: MakeTrainer) -> None:
    first = make_trainer(**FIRST)
    train(first, None)
    rollback = {"failed_step": 3, "checkpoint": 2, "rate": 0.5, "learning_rate": 0.1}
    (first.run_folder / "rollbacks.json").write_text(json.dumps([rollback]))
    for rate, used in ((0.1, 0.05), (0.01, 0.01)):
        trainer = make_trainer(**{**FIRST, "learning_rate": rate})
        train(trainer, trainer.run_folder / "checkpoint-2")
        assert rates(trainer.run_folder)[2:] == [used, used]


def test_the_record_forgets_what_is_done_again(tmp_path: Path) -> None:
    record_changes(tmp_path, 8, [])
    assert not (tmp_path / CHANGES_FILE).exists(), "nothing changed, nothing to keep"
    for step in (4, 8):
        record_changes(tmp_path, step, [f"`seed`: 1 then, {step} now"])
    assert [entry["after_step"] for entry in read_changes(tmp_path)] == [4, 8]
    record_changes(tmp_path, 6, [])
    assert [entry["after_step"] for entry in read_changes(tmp_path)] == [4]
    record_changes(tmp_path, 0, [])
    assert read_changes(tmp_path) == []


@pytest.mark.parametrize("damage", ["{", "[1]", "[{}]", '{"after_step": 1}', "\x00"])
def test_a_damaged_record_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / CHANGES_FILE).write_text(damage)
    with pytest.raises(CheckpointError, match=r"changed_settings.json cannot be read.*resume=never"):
        read_changes(tmp_path)
