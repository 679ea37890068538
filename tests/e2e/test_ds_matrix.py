"""Every generation, tuned in every way, under ZeRO-2 and ZeRO-3: two processes equal one, and the result loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from glmtune.adapter import load_adapter
from glmtune.loading import load_base, load_model
from glmtune.models.releases.families import Family
from tests.conftest import slow_except
from tests.e2e.conftest import MakeBase
from tests.e2e.stories import Story, run_sessions

pytest.importorskip("deepspeed", reason="the extra glmtune[deepspeed] is not installed")
FAMILIES = (Family.CHATGLM, Family.CHATGLM2, Family.CHATGLM2_32K, Family.CHATGLM3, Family.GLM4)
METHODS = {
    "full": ["+recipe=full", "trainer.learning_rate=1e-3"],
    "ptuning": [
        "+recipe=ptuning",
        "prefix.pre_seq_len=4",
        "prefix.dropout=0",
        "prefix.prefix_projection=true",
    ],
    "lora": ["+recipe=lora", "lora.rank=2", "lora.dropout=0"],
}
ALL = [(family, method, stage) for family in FAMILIES for method in METHODS for stage in ("zero2", "zero3")]
# In every run of the tests: both architectures, both stages.
SOME = [(Family.CHATGLM, "ptuning", "zero3"), (Family.GLM4, "lora", "zero2")]
COMMON = [
    *("data=files", "retention=null", "trainer.max_steps=3", "trainer.gradient_accumulation_steps=1"),
    *("trainer.logging_steps=1", "trainer.report_to=[]"),
]


@pytest.fixture(scope="module")
def matrix(
    make_base: MakeBase, question_rows: Path, slow_too: bool, tmp_path_factory: pytest.TempPathFactory
) -> Story:
    cells = ALL if slow_too else SOME
    folder = tmp_path_factory.mktemp("matrix")
    plan: list[dict[str, Any]] = []
    for family, method in dict.fromkeys((family, method) for family, method, _ in cells):
        base = [f"model.source={make_base(family, 'float32')}", f"model.family={family}"]
        words = [*METHODS[method], *COMMON, *base, f"data.train_file={question_rows}"]
        one, two = "trainer.per_device_train_batch_size=4", "trainer.per_device_train_batch_size=2"
        name = f"{family}-{method}"
        plan.append({"name": f"{name}-one", "overrides": [*words, one, f"output_dir={name}-one"], "count": 1})
        for stage in ("zero2", "zero3"):
            if (family, method, stage) in cells:
                cell = f"{name}-{stage}"
                overrides = [*words, two, f"deepspeed={stage}", f"output_dir={cell}"]
                plan.append({"name": cell, "overrides": overrides, "count": 2})
    return run_sessions(folder, plan)


@pytest.mark.parametrize(("family", "method", "stage"), slow_except(SOME, ALL))
def test_cell(family: Family, method: str, stage: str, matrix: Story, make_base: MakeBase) -> None:
    name = f"{family}-{method}"
    cell = f"{name}-{stage}"
    assert matrix.codes(f"{name}-one") == [0], matrix.said(f"{name}-one", 0)
    assert matrix.codes(cell) == [0, 0], matrix.said(cell, 0) + matrix.said(cell, 1)
    assert len(matrix.losses(cell)) == 3
    assert matrix.losses(cell) == pytest.approx(matrix.losses(f"{name}-one"), rel=5e-5)
    base = make_base(family, "float32")
    expected, found = (logits(matrix.folder / run, method, base, family) for run in (f"{name}-one", cell))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def logits(run: Path, method: str, base: Path, family: Family) -> torch.Tensor:
    """What a tuned model says to a few ids, loaded from its run folder."""
    last = run / "last"
    if method == "full":
        model: Any = load_base(last, family=family, device="cpu")
    elif method == "ptuning":
        model = load_model(base, family=family, device="cpu", prefix=last)
    else:
        model = load_adapter(last, load_base(base, family=family, device="cpu"))
    ids = torch.arange(5, 17)[None]
    if family is Family.CHATGLM:
        ids[0, -3:-1] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    return model.eval()(ids).logits
