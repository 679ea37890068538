"""Preference runs: margins grow, the base stays, a run that goes on repeats itself, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from glmtune.errors import CheckpointError, ConfigError
from glmtune.training.log import read_log
from glmtune.training.preference import reference
from glmtune.training.preference.trainer import PreferenceTrainer
from recipes import data
from recipes.train import COMMAND, TrainResult, run
from recipes.words.compose import load_settings

QUESTIONS = (
    "你好，今天想去哪里？",
    "晚上睡不着怎么办？",
    "还剩几个苹果？",
    "Which fruit?",
    "写一段广告。",
    "颜色？",
)
SMALL = (
    "retention=null",
    "trainer.max_steps=6",
    "trainer.learning_rate=1e-2",
    "trainer.per_device_train_batch_size=4",
    "trainer.gradient_accumulation_steps=1",
    "trainer.logging_steps=1",
    "trainer.eval_steps=3",
    "trainer.save_steps=2",
    "data=preference",
)
WAYS = {
    "prefix": ("+recipe=dpo", "prefix.pre_seq_len=4", "trainer.learning_rate=0.1"),
    "lora": ("+recipe=lora", "preference=dpo"),
    "full": ("+recipe=full", "preference=dpo"),
}
Words = Callable[..., list[str]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """24 pairs to learn and 12 to evaluate on: the better answer says yes."""
    folder, files = tmp_path_factory.mktemp("pairs"), {}
    for name, count in (("train", 24), ("validation", 12)):
        made = [
            {
                "prompt": f"{QUESTIONS[place % 6]}{place}",
                "chosen": f"yes, {place} apples" + "." * (place % 4),
                "rejected": f"no, a coat {place}" + "!" * (place % 3),
            }
            for place in range(count)
        ]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return files


@pytest.fixture
def words(tiny_base: Path, rows: dict[str, Path], tmp_path: Path) -> Words:
    """Return a command line of a small run, by the way of tuning."""

    def make(way: str, *more: str, folder: str = "run") -> list[str]:
        recipe, *own = WAYS.get(way, (way, *WAYS["prefix"][1:]))
        files = [f"data.{name}_file={file}" for name, file in rows.items()]
        places = [f"model.source={tiny_base}", f"output_dir={tmp_path / folder}", *files]
        return [recipe, *SMALL, *own, *places, *more]

    return make


def trained(words: list[str]) -> TrainResult:
    return run(load_settings(COMMAND, words))


def log_of(result: TrainResult, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(entry.get(name) for name in ("step", *names)) for entry in read_log(result.output_dir)]


@pytest.mark.parametrize("way", WAYS)
def test_margins_grow_and_the_base_stays(way: str, words: Words) -> None:
    result = trained(words(way))
    stages = result.results["preference"]
    assert (stages["baseline"]["margins"], stages["baseline"]["accuracies"]) == (
        pytest.approx(0, abs=1e-5),
        pytest.approx(0.5, abs=0.5 if way == "full" else 0),  # what is kept is read in other batches
    )
    assert stages["final"]["margins_low"] > 0
    assert stages["final"]["accuracies"] > 0.8
    assert result.results["baseline_eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert result.results["final_eval_loss"] < 0.65
    assert (result.results["train_rows"], result.results["final_eval_accuracy"]) == (
        24,
        stages["final"]["accuracies"],
    )
    lines = [entry for entry in read_log(result.output_dir) if "loss" in entry]
    assert len(lines) == 6
    for entry in lines:
        names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
        assert all(isinstance(entry[name], float) for name in (*names, "logps/chosen", "logps/rejected"))
        assert entry["rewards/margins"] == pytest.approx(entry["rewards/chosen"] - entry["rewards/rejected"])
    card = (result.output_dir / "README.md").read_text()
    assert "## Preferences" in card
    assert "Losses are those of dpo (beta 0.1)" in card
    if way == "prefix":  # nothing else is in the folder
        assert set(load_file(result.output_dir / "last" / "prefix_encoder.safetensors")) >= {
            "embedding.weight"
        }
    elif way == "lora":
        names = load_file(result.output_dir / "last" / "adapter_model.safetensors")
        assert all("lora" in name for name in names)


def test_the_first_step_of_a_gated_prefix_is_at_the_reference(words: Words) -> None:
    result = trained(words("prefix", "prefix.dropout=0.0"))
    first = next(entry for entry in read_log(result.output_dir) if "loss" in entry)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("recipe", ["ipo", "orpo", "kto"])
def test_other_losses(recipe: str, words: Words) -> None:
    result = trained(words(f"+recipe={recipe}"))
    first, last = (result.results["preference"][name] for name in ("baseline", "final"))
    assert last["margins"] > first["margins"]
    assert last["accuracies"] > 0.7
    assert result.results["final_eval_loss"] < result.results["baseline_eval_loss"]
    card = (result.output_dir / "README.md").read_text(encoding="utf-8")
    assert ("the baseline is the model without tuning" in card) == (recipe == "orpo"), "it has no reference"
    assert ("of single answers those whose reward" in card) == (recipe == "kto")
    assert ("kl" in next(e for e in read_log(result.output_dir) if "loss" in e)) == (recipe == "kto")


NAMES = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "eval_loss", "eval_rewards/margins_high")


@pytest.mark.parametrize(
    "way", ["prefix", "full", "+recipe=kto"], ids=["prefix", "full-kept-reference", "kto"]
)
def test_a_run_that_goes_on_repeats_itself(way: str, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    more = (
        "trainer.logging_steps=3",
        "trainer.gradient_accumulation_steps=2",
        "trainer.per_device_train_batch_size=2",
    )
    whole = trained(words(way, *more, folder="whole"))
    stopped = words(way, *more, folder="stopped")
    with monkeypatch.context() as patched:  # killed in step 5, after the checkpoint of step 4
        count = PreferenceTrainer._get_num_items_in_batch

        def dies(self: Any, *args: Any) -> Any:
            if self.state.global_step == 4:
                raise KeyboardInterrupt
            return count(self, *args)

        patched.setattr(PreferenceTrainer, "_get_num_items_in_batch", dies)
        with pytest.raises(KeyboardInterrupt):
            trained(stopped)
    again = trained(stopped)
    assert log_of(again, *NAMES) == log_of(whole, *NAMES)
    weights = [
        load_file(next((result.output_dir / "last").glob("*.safetensors"))) for result in (whole, again)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_micro_batches_do_not_matter(words: Words) -> None:
    """A step of 8 pairs is the same however it is parted, the usual loss beside it included."""
    fixed = ("prefix.dropout=0.0", "preference.sft_weight=0.5", "trainer.group_by_length=false")
    batch, passes = "trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps"
    whole = trained(words("prefix", *fixed, f"{batch}=8", folder="whole"))
    shared = (f"{batch}=2", f"{passes}=4", "trainer.per_device_eval_batch_size=3")
    parted = trained(words("prefix", *fixed, *shared, folder="parted"))
    for kind, names in (
        ("loss", ("loss", "rewards/margins", "logps/rejected")),
        ("eval_loss", ("eval_loss", "eval_rewards/margins", "eval_nll")),
    ):
        found, expected = (
            [entry[name] for entry in read_log(result.output_dir) if kind in entry for name in names]
            for result in (parted, whole)
        )
        assert found == pytest.approx(expected, rel=2e-4, abs=2e-5)


def test_a_prefix_that_is_tuned_further_is_measured_against_what_it_was(words: Words) -> None:
    first = trained(words("prefix", folder="first"))
    more = (f"prefix_path={first.output_dir}", "prefix.dropout=0.0")
    second = trained(words("prefix", *more, folder="second"))
    stages = second.results["preference"]
    assert stages["baseline"]["margins"] == pytest.approx(0, abs=1e-5)
    assert stages["final"]["margins_low"] > 0
    # Beside the base the same prefix has gained more.
    log_probs = first.results["preference"]["final"]["logps/chosen"]
    assert stages["baseline"]["logps/chosen"] == pytest.approx(log_probs, rel=1e-4)
    assert (second.output_dir / reference.REFERENCE_FILE).is_file()
    third = trained(words("prefix", *more, "preference.reference=base", folder="third"))
    margins = [result.results["preference"]["final"]["margins"] for result in (first, second, third)]
    assert margins[2] > margins[0]
    assert not (third.output_dir / reference.REFERENCE_FILE).exists()


def test_a_kept_reference_that_is_gone_or_of_other_rows(words: Words, rows: dict[str, Path]) -> None:
    line = words("full", "trainer.max_steps=2")
    result = trained(line)
    (result.output_dir / "all_results.json").unlink()
    longer = [*line, "trainer.max_steps=3", "resume=force"]
    few = f"data.validation_file={rows['train']}"
    with pytest.raises(CheckpointError, match=r"holds no reference of these 24 validation examples"):
        trained([*longer, few])
    with pytest.raises(CheckpointError, match=r"of these 24 train examples: they, or the lengths"):
        trained([*longer, "data.max_target_length=8"])
    (result.output_dir / reference.REFERENCE_FILE).write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"reference\.safetensors cannot be read"):
        trained(longer)


@pytest.mark.parametrize("is_there", [True, False], ids=["there", "missing"])
def test_all_processes_ask_one_whether_to_keep_the_reference(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looked by himself might find what the first process has just written, and leave it alone."""
    asked: list[Callable[[], None]] = []
    monkeypatch.setattr(reference.collectives, "broadcast_from_main", asked.append)
    start = object.__new__(reference.ReferenceStart)
    start._trainer = cast(Any, SimpleNamespace(run_folder=tmp_path, sets=dict))
    start._kept = {"train": np.zeros((1, 2), np.float32)}
    file = tmp_path / reference.REFERENCE_FILE
    if is_there:
        file.parent.mkdir()
        file.write_bytes(b"as it was")
    state = cast(Any, SimpleNamespace(global_step=4))
    start.on_train_begin(cast(Any, None), state, cast(Any, None))
    [keep] = asked
    keep()
    assert (file.read_bytes() == b"as it was") == is_there


def test_a_run_that_is_set_aside_takes_its_reference_along(words: Words) -> None:
    """Else the new run would write over what the earlier one needs to go on."""
    first = trained(words("full", "trainer.max_steps=2"))
    kept = (first.output_dir / reference.REFERENCE_FILE).read_bytes()
    trained(words("full", "trainer.max_steps=2", "resume=never", "data.max_target_length=8"))
    assert (first.output_dir / "previous" / "1" / reference.REFERENCE_FILE).read_bytes() == kept
    assert (first.output_dir / reference.REFERENCE_FILE).read_bytes() != kept


def test_adapters_are_on_again_after_they_were_passed_by(words: Words) -> None:
    result = trained(words("lora", "trainer.eval_steps=1"))
    margins = [entry["rewards/margins"] for entry in read_log(result.output_dir) if "loss" in entry]
    assert margins[-1] > margins[0]
    evaluated = [
        entry["eval_rewards/margins"] for entry in read_log(result.output_dir) if "eval_loss" in entry
    ]
    assert all(margin != 0 for margin in evaluated[1:])


def test_with_replay_both_losses_are_learnt(words: Words, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in QUESTIONS), encoding="utf-8")
    more = ("retain=normal", f"retain.prompts={prompts}", "retain.max_new_tokens=4")
    result = trained(words("prefix", *more))
    lines = [entry for entry in read_log(result.output_dir) if "loss" in entry]
    assert all(entry["retain_loss"] > 0 for entry in lines)
    assert result.results["preference"]["final"]["margins"] > 0


@pytest.mark.parametrize("way", ["prefix", "lora"])
def test_checkpointed_activations_change_nothing(way: str, words: Words) -> None:
    fixed = ("trainer.max_steps=3", "prefix.dropout=0.0" if way == "prefix" else "lora.dropout=0.0")
    runs = [
        trained(words(way, *fixed, f"trainer.gradient_checkpointing={on}", folder=f"checkpointing-{on}"))
        for on in ("false", "true")
    ]
    plain, sparing = (
        [entry["rewards/margins"] for entry in read_log(result.output_dir) if "loss" in entry]
        for result in runs
    )
    assert sparing == pytest.approx(plain, rel=1e-4, abs=1e-6)


def test_over_codes(words: Words) -> None:
    stages = trained(words("prefix", "quantization=int8")).results["preference"]
    assert stages["final"]["margins_low"] > 0


# ---- settings


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        pytest.param(
            ["+recipe=ptuning", "preference=dpo"], "`data.layout` is `adgen`, whose rows", id="layout"
        ),
        pytest.param(["data=preference"], "`preference` is null, so nothing compares", id="null"),
        pytest.param(
            ["+recipe=dpo", "prefix.switch=true"], r"`prefix.switch` is true.*switch=false", id="switch"
        ),
        pytest.param(
            ["+recipe=full", "preference=dpo", "preference.reference=base", "data=preference"],
            "there is no base to measure against",
            id="full",
        ),
        pytest.param(
            ["+recipe=dpo", "data.packing=true"], "both of a pair must be in one batch", id="packing"
        ),
        pytest.param(
            ["+recipe=orpo", "preference.reference=base"], "`orpo`, which does not read it", id="orpo"
        ),
        pytest.param(["+recipe=kto", "preference.label_smoothing=0.1"], "of dpo", id="smoothing"),
        pytest.param(
            ["+recipe=dpo", "preference.beta=0"], "`preference.beta` is 0.0, but it must", id="beta"
        ),
        pytest.param(["+recipe=dpo", "preference.beta=inf"], "`preference.beta` is inf", id="infinite-beta"),
        pytest.param(
            ["+recipe=kto", "preference.desirable_weight=0", "preference.undesirable_weight=0"],
            "then nothing is learnt",
            id="no-weight",
        ),
        pytest.param(["+recipe=dpo", "preference.los=kto"], "Did you mean `preference.loss`", id="name"),
        pytest.param(
            ["+recipe=full", "preference=dpo", "data=preference", "from_scratch=true", "retention=null"],
            "random weights prefer nothing",
            id="scratch",
        ),
    ],
)
def test_what_is_refused(line: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_settings(COMMAND, line)


def test_rows_of_ones_own_are_told_by_their_columns(words: Words) -> None:
    line = [word for word in words("lora") if word != "data=preference"]
    config = load_settings(COMMAND, [*line, "data=files"])
    assert config.data.layout == "preference"
    assert trained([*line, "data=files", "trainer.max_steps=2"]).results["preference"]["final"]["step"] == 2


def test_a_check_reads_pairs_with_and_without_a_loss() -> None:
    own = ["data=files", "data.train_file=pairs.jsonl"]
    for line in (["data=preference"], [*own, "data.layout=preference"], ["+recipe=dpo", *own]):
        assert load_settings(data.COMMAND, line).data.layout == "preference"


def test_a_setting_of_the_group_stands_for_dpo() -> None:
    config = load_settings(COMMAND, ["+recipe=lora", "data=preference", "preference.beta=0.3"])
    assert (config.preference.loss, config.preference.beta) == ("dpo", 0.3)
    assert load_settings(COMMAND, ["+recipe=kto"]).preference.loss == "kto"


def test_a_setting_of_the_group_leaves_what_a_recipe_of_ones_own_chose(tmp_path: Path) -> None:
    texts = {
        "mine": "defaults: [lora, {override /data: preference}, {override /preference: kto}, _self_]",
        "further": "defaults: [mine, _self_]",
    }
    (tmp_path / "recipe").mkdir()
    for name, text in texts.items():
        (tmp_path / "recipe" / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    for name in texts:
        config = load_settings(COMMAND, [f"+recipe={name}", "preference.beta=0.3"], tmp_path)
        assert (config.preference.loss, config.preference.beta) == ("kto", 0.3)
