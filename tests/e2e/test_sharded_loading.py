"""Two processes that read their parts of a base train to the very numbers of two that read all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glmtune.models.releases.families import Family
from tests.e2e.conftest import MakeBase
from tests.e2e.stories import Story, run_sessions
from tests.e2e.test_ds_matrix import METHODS

pytest.importorskip("deepspeed", reason="the extra glmtune[deepspeed] is not installed")
# What every run of the tests sees of it: test_ds_processes (ZeRO-3) and test_fsdp_processes.
pytestmark = pytest.mark.slow
ZERO, FSDP = "deepspeed=zero3", "distributed=fsdp"
CELLS = [
    (family, method, division)
    for family in (Family.CHATGLM, Family.GLM4)
    for method in METHODS
    for division in (ZERO, "deepspeed=zero3_offload", FSDP)
]
COMMON = [
    *(
        "data=files",
        "retention=null",
        "trainer.max_steps=4",
        "trainer.gradient_accumulation_steps=1",
        "trainer.save_steps=2",
    ),
    *("trainer.logging_steps=1", "trainer.report_to=[]", "trainer.per_device_train_batch_size=2"),
    "resume=force",
]


def name_of(family: Family, method: str, division: str) -> str:
    return f"{family}-{method}-{division.partition('=')[2]}"


@pytest.fixture(scope="module")
def story(make_base: MakeBase, question_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    plan: list[dict[str, Any]] = []
    for family, method, division in CELLS:
        base = [f"model.source={make_base(family, 'float16')}", f"model.family={family}"]
        files = [f"data.{name}_file={question_rows}" for name in ("train", "validation")]
        words, name = [*METHODS[method], *COMMON, *base, *files, division], name_of(family, method, division)
        fate = {"fate": "reads_all", "rank": "all"}
        plan += [
            {"name": f"{name}-{way}", "count": 2, "overrides": [*words, f"output_dir={name}-{way}"], **more}
            for way, more in (("whole", fate), ("parts", {}))
        ]
        resumed = [*words, f"resume={name}-parts/checkpoint-2", f"output_dir={name}-resumed"]
        plan.append({"name": f"{name}-resumed", "count": 2, "overrides": resumed})
    return run_sessions(tmp_path_factory.mktemp("parts"), plan)


@pytest.mark.parametrize(("family", "method", "division"), CELLS)
def test_reading_parts_changes_nothing(family: Family, method: str, division: str, story: Story) -> None:
    name = name_of(family, method, division)
    for way in ("whole", "parts", "resumed"):
        assert story.codes(f"{name}-{way}") == [0, 0], story.said(f"{name}-{way}", 0)
    assert len(story.losses(f"{name}-whole")) == 4
    assert story.losses(f"{name}-parts") == story.losses(f"{name}-whole")
    assert story.evaluations(f"{name}-parts") == story.evaluations(f"{name}-whole")
    assert story.losses(f"{name}-resumed") == story.losses(f"{name}-whole")[2:]
    cards = [(story.folder / f"{name}-{way}" / "all_results.json").read_text() for way in ("whole", "parts")]
    assert all('"base_fingerprint": "' in card for card in cards)
