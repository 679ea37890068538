"""A run begun by a version that knew no retention, replay, gate or switch goes on by the same command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from glmtune.errors import ConfigError
from glmtune.training.log import read_log
from recipes.train import COMMAND, TrainResult, run
from recipes.words.compose import load_settings

SMALL = {"ptuning": ["prefix.pre_seq_len=4"], "lora": ["lora.rank=2"], "full": []}
WEIGHTS = {"ptuning": "prefix_encoder", "lora": "adapter_model", "full": "model"}
NEW_GROUPS = ("retention", "retain")
NEW = ("gate", "switch", "switch_min_auroc", "switch_prompts")
"""Of ``prefix`` and ``lora``."""


def trained(recipe: str, base: Path, rows: Mapping[str, Path], output: Path, *more: str) -> TrainResult:
    words = [
        *(f"+recipe={recipe}", *SMALL[recipe], "data=files", "data.layout=adgen", f"model.source={base}"),
        *(f"data.{part}_file={rows[part]}" for part in ("train", "validation")),
        *("trainer.max_steps=4", "trainer.save_steps=2", "trainer.eval_steps=2", "trainer.report_to=[]"),
        *("trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=1"),
        *("trainer.learning_rate=1e-3", f"output_dir={output}"),
    ]
    return run(load_settings(COMMAND, [*words, *more]))


def as_before(folder: Path) -> None:
    """Leave a run as a killed one of then: to step 2, and no word of what nobody knew."""
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "all_results.json").unlink()
    file = folder / "config.yaml"
    settings: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    for name in NEW_GROUPS:
        del settings[name]
    for group in ("prefix", "lora"):
        for name in NEW:
            (settings.get(group) or {}).pop(name, None)
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    for manifest in folder.glob("*/checkpoint.json"):
        assert not {"switch", "retention_fingerprint", "retain_fingerprint"} & set(
            json.loads(manifest.read_text())
        )


@pytest.mark.parametrize("recipe", ["ptuning", "lora"])
def test_it_goes_on(
    recipe: str,
    tiny_base: Path,
    tiny_rows: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    off = ["retention=null"] + ["prefix.switch=false"] * (recipe == "ptuning")
    whole = trained(recipe, tiny_base, tiny_rows, tmp_path / "whole", *off)
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    as_before(folder)
    capsys.readouterr()
    few = ["retention.num_prompts=4", "retention.max_new_tokens=4"]
    done = trained(recipe, tiny_base, tiny_rows, folder, *few)
    assert done.steps == 4
    one, two = (
        load_file(each / "last" / f"{WEIGHTS[recipe]}.safetensors") for each in (whole.output_dir, folder)
    )
    weights = {name for name in two if not name.startswith("switch.")}
    assert one.keys() == weights
    assert all(bool((one[name] == two[name]).all()) for name in weights)
    assert [entry["step"] for entry in read_log(folder) if "eval_retention" in entry] == [4]
    if recipe == "ptuning":  # what the recipe has today, fitted where the run goes on
        assert "switch: " in capsys.readouterr().err
        assert done.results["switch"]["saved"] == ("switch.weight" in two)


def test_a_finished_one_is_finished(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = trained("ptuning", tiny_base, tiny_rows, folder, "retention=null", "prefix.switch=false").results
    results = (folder / "all_results.json").read_bytes()
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    as_before(folder)
    shutil.move(tmp_path / "checkpoint-4", folder)
    (folder / "all_results.json").write_bytes(results)
    assert trained("ptuning", tiny_base, tiny_rows, folder).results == done


def test_all_weights_have_no_base_any_more(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    whole = trained("full", tiny_base, tiny_rows, folder, "retention=null").results
    as_before(folder)
    with pytest.raises(ConfigError, match=r"all weights are tuned.*Add `retention=null`"):
        trained("full", tiny_base, tiny_rows, folder)
    done = trained("full", tiny_base, tiny_rows, folder, "retention=null").results
    assert done["final_eval_loss"] == whole["final_eval_loss"]
