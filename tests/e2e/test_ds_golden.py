"""Full tuning in two processes under ZeRO follows the trajectories of the released code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glmtune.models.load import load_official
from tests.conftest import slow_except
from tests.e2e.stories import Story, run_sessions

pytest.importorskip("deepspeed", reason="the extra glmtune[deepspeed] is not installed")
CHECKPOINTS = {
    "v1": "checkpoint_bin",
    "v2": "checkpoint_bin",
    "v2_32k": "checkpoint_safetensors",
    "glm3": "checkpoint_bin",
    "glm4": "checkpoint_safetensors",
}
ALL = [(name, stage) for name in CHECKPOINTS for stage in (2, 3)]
SOME = [("v1", 3), ("v2", 2)]  # both architectures, both stages
STEP_LOSS, LOGITS = 5e-5, 1e-4  # the tolerances the oracles state


@pytest.fixture(scope="module")
def story(oracles: Path, slow_too: bool, tmp_path_factory: pytest.TempPathFactory) -> Story:
    plan = [
        {
            "name": f"{name}-zero{stage}",
            "golden": [str(oracles / name), str(oracles / name / CHECKPOINTS[name]), stage],
            "count": 2,
        }
        for name, stage in (ALL if slow_too else SOME)
    ]
    return run_sessions(tmp_path_factory.mktemp("golden"), plan)


@pytest.mark.parametrize(("name", "stage"), slow_except(SOME, ALL))
def test_full_fine_tuning(name: str, stage: int, story: Story, oracles: Path) -> None:
    run = f"{name}-zero{stage}"
    assert story.codes(run) == [0, 0], story.said(run, 0) + story.said(run, 1)
    tensors = load_file(oracles / name / "finetune.safetensors")
    losses, norms = (torch.tensor(story.logged(run, key)) for key in ("loss", "grad_norm"))
    expected = {key: tensors[f"full.train20.{key}"].view(-1) for key in ("losses", "grad_norms")}
    torch.testing.assert_close(losses, expected["losses"], atol=STEP_LOSS, rtol=0)
    torch.testing.assert_close(norms, expected["grad_norms"], atol=1e-5, rtol=1e-4)
    model = load_official(story.folder / run / "last", dtype="float32", device="cpu").eval()
    with torch.no_grad():
        probe = load_file(oracles / name / "cases.safetensors")["plain_b.input_ids"]
        logits = model(probe).logits[:, -4:]
    torch.testing.assert_close(logits, tensors["full.train20.final_probe_logits_last4"], atol=LOGITS, rtol=0)
