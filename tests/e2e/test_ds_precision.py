"""Half precision under ZeRO, in two processes on the CPU: bf16 trains, fp16 scales its loss or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import slow_except
from tests.e2e.stories import Story, run_sessions

pytest.importorskip("deepspeed", reason="the extra glmtune[deepspeed] is not installed")
ALL, SOME = ("zero2", "zero3", "zero3_offload"), ("zero3",)
ONE = "trainer.per_device_train_batch_size=4"  # the rows that two processes take together
TWO = "trainer.per_device_train_batch_size=2"
COMMON = [
    *("data=files", "data.layout=adgen", "data.max_train_samples=37", "resume=force"),
    *(
        "retention=null",
        "trainer.learning_rate=1e-3",
        "trainer.max_steps=6",
        "trainer.gradient_accumulation_steps=2",
    ),
    *("trainer.logging_steps=1", "trainer.save_steps=4", "trainer.report_to=[]"),
]
BF16, FP16 = "trainer.precision=bf16", "trainer.precision=fp16"
ROUNDING = 1e-3
SCALES = {"high": 19, "smallest": 0}  # loss scales to begin with, as powers of 2


def sessions(base: list[str], slow_too: bool) -> list[dict[str, Any]]:
    plan: list[dict[str, Any]] = []

    def session(name: str, *overrides: str, count: int = 2, **more: Any) -> None:
        recipe = more.pop("recipe", "+recipe=full")
        words = [recipe, *base, ONE if count == 1 else TWO, f"output_dir={more.pop('run', name)}", *overrides]
        plan.append({"name": name, "overrides": words, "count": count, **more})

    session("float32", count=1)
    for stage in ALL if slow_too else SOME:
        session(f"bf16-{stage}", BF16, f"deepspeed={stage}")
    session("overflow", FP16, "+deepspeed.config_file=high.json", half=True)
    session("refused", FP16, "deepspeed=zero2")
    if not slow_too:
        return plan
    for stage in ALL:
        session(f"fp16-{stage}", FP16, f"deepspeed={stage}", half=True)
    session("bf16-one", BF16, "deepspeed=zero2", count=1)
    session("bf16-stopped", BF16, "deepspeed=zero2", fate="told_to_stop", step=3)
    session("bf16-resumed", BF16, "deepspeed=zero2", run="bf16-stopped")
    words = ["resume=overflow/checkpoint-4", "+deepspeed.config_file=high.json"]
    session("overflow-resumed", FP16, *words, half=True)
    steep = {"fate": "bad_gradient", "step": 5}
    session("exhausted", FP16, "+deepspeed.config_file=smallest.json", half=True, **steep)
    session("refused-base", "model.dtype=float16", "deepspeed=zero2", recipe="+recipe=ptuning")
    return plan


@pytest.fixture(scope="module")
def story(
    tiny_base: Path, tiny_rows: dict[str, Path], slow_too: bool, tmp_path_factory: pytest.TempPathFactory
) -> Story:
    files = [f"data.{name}_file={tiny_rows[name]}" for name in ("train", "validation")]
    folder = tmp_path_factory.mktemp("precision")
    for name, power in SCALES.items():
        scale = {"enabled": "auto", "initial_scale_power": power, "hysteresis": 1}
        config = {"zero_optimization": {"stage": 2}, "fp16": scale}
        (folder / f"{name}.json").write_text(json.dumps(config))
    plan = sessions([*COMMON, f"model.source={tiny_base}", *files], slow_too)
    return run_sessions(folder, plan)


@pytest.mark.parametrize("stage", slow_except(SOME, ALL))
def test_bf16(story: Story, slow_too: bool, stage: str) -> None:
    run = f"bf16-{stage}"
    assert story.codes(run) == [0, 0], story.said(run, 0) + story.said(run, 1)
    assert len(story.losses(run)) == 6
    for other in ("float32", "bf16-one") if slow_too else ("float32",):
        assert story.losses(run) == pytest.approx(story.losses(other), rel=ROUNDING)
    assert story.losses(run) != story.losses("float32")  # it was bf16 that computed
    weights = story.weights(run).values()
    assert {weight.dtype for weight in weights} == {torch.float32}  # what the optimizer holds
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights)


@pytest.mark.slow
def test_bf16_stopped_and_resumed_equals_not_stopped(story: Story) -> None:
    assert story.codes("bf16-stopped") == [143, 143], story.said("bf16-stopped", 0)
    assert story.codes("bf16-resumed") == [0, 0], story.said("bf16-resumed", 0)
    assert story.losses("bf16-stopped") == story.losses("bf16-zero2")
    expected, found = story.weights("bf16-zero2"), story.weights("bf16-stopped")
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ALL)
def test_fp16(story: Story, stage: str) -> None:
    run = f"fp16-{stage}"
    assert story.codes(run) == [0, 0], story.said(run, 0) + story.said(run, 1)
    assert len(story.losses(run)) == 6
    assert story.losses(run) == pytest.approx(story.losses("float32"), rel=ROUNDING)
    assert {weight.dtype for weight in story.weights(run).values()} == {torch.float32}


def test_fp16_skips_steps_until_the_loss_scale_fits(story: Story) -> None:
    assert story.codes("overflow") == [0, 0], story.said("overflow", 0) + story.said("overflow", 1)
    is_skipped = [norm == float("inf") for norm in story.logged("overflow", "grad_norm")]
    assert is_skipped[0]
    assert sum(is_skipped) <= 4
    alert = next(entry for entry in story.log("overflow") if entry.get("alert") == "skipped_step")
    assert (alert["step"], alert["loss_scale"]) == (1, 2.0**18)
    rates, plain = (story.logged(run, "learning_rate") for run in ("overflow", "float32"))
    taken = [number - sum(is_skipped[:number]) for number in range(6)]
    assert rates == [plain[number] for number in taken]  # a skipped step takes nothing off the schedule


@pytest.mark.slow
def test_fp16_goes_on_with_its_loss_scale(story: Story) -> None:
    assert story.codes("overflow-resumed") == [0, 0], story.said("overflow-resumed", 0)
    for key in ("loss", "grad_norm", "learning_rate"):
        assert story.logged("overflow-resumed", key) == story.logged("overflow", key)[4:]
    expected, found = story.weights("overflow"), story.weights("overflow-resumed")
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.slow
def test_fp16_that_no_loss_scale_helps_goes_back(story: Story) -> None:
    assert story.codes("exhausted") == [75, 75], story.said("exhausted", 0) + story.said("exhausted", 1)
    assert "The gradient norm of step 5 is not finite" in story.said("exhausted", 0)
    assert "going back from step 5 to checkpoint-4" in story.said("exhausted", 0)
    assert "Traceback" not in story.said("exhausted", 0)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("refused", "`trainer.precision` is `fp16`, but that needs a GPU"),
        pytest.param(
            "refused-base",
            "`model.dtype` is `float16`, in which DeepSpeed would compute, but that needs a GPU",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_fp16_without_a_gpu_is_refused(story: Story, run: str, words: str) -> None:
    assert story.codes(run) == [2, 2], story.said(run, 0)
    for rank in (0, 1):
        assert words in story.said(run, rank)
        assert "Traceback" not in story.said(run, rank)
