"""An adapter from a stranger: nothing it names is imported or run, and nothing takes the size it asks for."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glmtune.adapter.config import PLAIN_LORA, read_adapter_config
from glmtune.adapter.load import find_adapter, load_adapter, trained_on
from glmtune.errors import CheckpointError
from glmtune.models.load import load_official
from glmtune.training.adapt import tune_adapter
from glmtune.training.settings import LoraSettings

IDS = torch.tensor([[3, 5, 8, 4]])


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Path:
    return tiny_base


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    tuned = tune_adapter(load_official(base), LoraSettings(rank=2, targets=["q_proj", "o_proj"]))
    for name, parameter in tuned.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    (tmp_path / "adapter").mkdir()
    tuned.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, **values: Any) -> Path:
    file = folder / "adapter_config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, **values}))
    return file


def logits(folder: Path, base: Path) -> torch.Tensor:
    return load_adapter(folder, load_official(base))(IDS).logits


def test_modules_that_a_file_names_are_not_imported(adapter: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    sys.path.insert(0, str(tmp_path))
    try:
        expected = logits(adapter, base)
        change(
            adapter,
            auto_mapping={"base_model_class": "X", "parent_library": "evil_module"},
            megatron_core="evil_module",
            base_model_name_or_path="evil_module",
            revision="evil_module",
            runtime_config={"ephemeral_gpu_offload": True},
        )
        assert torch.equal(logits(adapter, base), expected)
        change(adapter, megatron_config={"hidden_size": 1})
        with pytest.raises(CheckpointError, match=r"megatron_config = .*but it must be None"):
            logits(adapter, base)
    finally:
        sys.path.remove(str(tmp_path))
    assert "evil_module" not in sys.modules
    assert not (tmp_path / "ran").exists()


SLOW = "(a+)+" * 8 + "b"
"""An expression that backtracks for longer than the universe on a long name."""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", f".*{SLOW}"),
        ("target_modules", [SLOW]),
        ("target_modules", "all-linear"),
        ("exclude_modules", SLOW),
        ("exclude_modules", [f"{SLOW}"]),
        ("layers_pattern", SLOW),
        ("rank_pattern", {SLOW: 2}),
        ("alpha_pattern", {"(.*.*.*)*x": 2}),
    ],
)
def test_no_expression_of_a_file_is_run(
    key: str, value: Any, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = change(adapter, layers_to_transform=[0], **{key: value})
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"{file} cannot be used; .*\n- {key} = "):
        logits(adapter, base)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "pattern", [r".*\.(q_proj|o_proj)", r"^(.*\.)?(?:q_proj|o_proj)$", r".*(q_proj|o_proj)"]
)
def test_plain_ends_of_names_are_understood(pattern: str, adapter: Path, base: Path) -> None:
    expected = logits(adapter, base)
    change(adapter, target_modules=pattern, rank_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 2})
    assert torch.equal(logits(adapter, base), expected)


def test_ranks_and_blocks_of_a_file_are_obeyed(adapter: Path, base: Path) -> None:
    names = {"layers.1.self_attn.q_proj": 2, "o_proj": 2}
    change(adapter, r=5, rank_pattern=names | {"q_proj": 2}, alpha_pattern={"o_proj": 4.5}, use_rslora=True)
    adapted = load_adapter(adapter, load_official(base))
    layer: Any = adapted.get_submodule("base_model.model.model.layers.0.self_attn.o_proj")
    assert layer.scaling["default"] == pytest.approx(4.5 / 2**0.5)
    change(adapter, layers_to_transform=0, layers_pattern="layers")
    with pytest.raises(CheckpointError, match=r"0 tensors are missing .* have no place \(\S*layers\.1"):
        logits(adapter, base)


BAD_VALUES: list[tuple[str, Any]] = [
    *((key, "x") for key in PLAIN_LORA if key != "bias"),
    ("bias", "all"),
    ("peft_type", "PROMPT_TUNING"),
    ("layer_replication", [[0, 10**9]]),
    ("init_lora_weights", "pissa_niter_1000000"),
    ("init_lora_weights", "loftq"),
    ("r", 10**20), ("r", 0), ("r", -1), ("r", 2.0), ("r", True), ("r", "2"), ("r", None), ("r", [2]),
    ("lora_alpha", 1e300), ("lora_alpha", 0), ("lora_alpha", "16"), ("lora_alpha", 10**400),
    ("rank_pattern", {"q_proj": 10**12}), ("rank_pattern", [1]), ("rank_pattern", {"q_proj": None}),
    ("layers_to_transform", -1), ("layers_to_transform", [10**30]), ("layers_to_transform", "0"),
    ("target_modules", []), ("target_modules", {"q_proj": 1}), ("target_modules", [7]),
    ("target_modules", ["q_proj"] * 20_000), ("new_way_of_peft", {"on": True}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_what_is_no_plain_lora_is_refused_by_name(key: str, value: Any, adapter: Path) -> None:
    file = change(adapter, **{key: value})
    with pytest.raises(CheckpointError, match=rf"cannot be used; .*\n- (unknown key )?{key} = ") as caught:
        read_adapter_config(file)
    assert len(str(caught.value)) < 1000, "a value of a file is cut where it is shown"


@pytest.mark.parametrize("off", [None, False, [], {}])
def test_what_is_switched_off_changes_nothing(off: Any, adapter: Path, base: Path) -> None:
    expected = logits(adapter, base)
    change(adapter, new_way_of_peft=off, modules_to_save=off, layer_replication=off)
    assert torch.equal(logits(adapter, base), expected)


@pytest.mark.parametrize(
    "text",
    ["[1]", "{", "", '{"r": NaN}', '{"r": 2, "r": 3}', "[" * 100_000, '{"r": ' + "9" * 5000 + "}", "\xff"],
)
def test_files_that_are_no_json_object(text: str, adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"{file} (is no valid JSON|holds a list)"):
        read_adapter_config(file)
    with pytest.raises(CheckpointError):
        trained_on(adapter)


def test_tensors_are_compared_before_anything_is_built(
    adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    def never(*_: object, **__: object) -> None:
        raise AssertionError("PEFT was asked to build something")

    monkeypatch.setattr(peft, "get_peft_model", never)
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    name = next(iter(whole))
    for changed, words in (
        ({**whole, name: whole[name][:1].clone()}, rf"{name} is \[.*is expected"),
        ({**whole, name: whole[name].to(torch.int8)}, rf"{name} is .* of torch.int8"),
        ({key: value for key, value in whole.items() if key != name}, rf"1 tensors are missing \({name}"),
        ({**whole, "evil": torch.ones(1)}, r"1 have no place \(evil\)"),
        ({**whole, name: torch.full_like(whole[name], float("nan"))}, rf"not finite.*first in {name}"),
    ):
        save_file(changed, file)
        with pytest.raises(CheckpointError, match=words):
            logits(adapter, base)
    save_file(whole, file)
    change(adapter, r=60_000)  # as the rule for one value allows, but not what is in the file
    with pytest.raises(CheckpointError, match=r"is \[2, \d+\] of torch.float32, but \[60000, "):
        logits(adapter, base)


def test_a_manifest_that_was_edited_is_said(adapter: Path) -> None:
    (adapter / "checkpoint.json").write_text('{"base_fingerprint": 7}')
    with pytest.raises(CheckpointError, match=r"checkpoint.json says base_fingerprint = 7"):
        trained_on(adapter)


@pytest.mark.parametrize(
    "name", ["checkpoint-²", "checkpoint-" + "9" * 200, "checkpoint-1e9", "checkpoint--1"]
)
def test_folders_whose_number_is_none(name: str, adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    adapter.rename(run / name)
    with pytest.raises(CheckpointError, match="No adapter at"):
        find_adapter(run)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = [*PLAIN_LORA, "r", "lora_alpha", "target_modules", "rank_pattern", "layers_to_transform", "peft_type"]


@pytest.mark.parametrize("examples", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_any_values_end_in_a_configuration_or_an_error_of_ours(examples: int, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    good = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), JSON, max_size=4))
    def read(values: dict[str, Any]) -> None:
        file.write_text(json.dumps({**good, **values}))
        try:
            config = read_adapter_config(file)
        except CheckpointError:
            return
        assert 1 <= config.rank <= 65536
        assert config.targets
        config.adapted(["model.layers.0.self_attn.q_proj", ""])

    read()
