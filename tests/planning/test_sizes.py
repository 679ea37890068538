"""Sizes of models, descriptions of hardware, and what a run's settings make of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from glmtune.errors import CheckpointError, ConfigError
from glmtune.models.checkpoints.config import native_config
from glmtune.models.load import build_model
from glmtune.models.releases.families import Family
from glmtune.models.releases.presets import PRESETS
from glmtune.planning.geometry import read_geometry
from glmtune.planning.hardware import GIB, Hardware, detect_hardware, host_memory_bytes, parse_hardware
from glmtune.planning.probe import official_values
from glmtune.planning.states import OPTIMIZER_BYTES, base_bytes, num_trained, states_of
from glmtune.planning.workload import workload_of
from glmtune.quantization.arithmetic.methods import EXTERNAL, METHODS
from glmtune.training.settings import OPTIMIZERS
from recipes.plan import COMMAND
from recipes.words.compose import load_settings

H80 = parse_hardware("4x80GB")


def plan_settings(*words: str):
    return load_settings(COMMAND, list(words))


def work_of(*words: str, hardware: Hardware = H80, **options):
    config = plan_settings(*words)
    return workload_of(config, read_geometry(config.model.source), hardware, **options)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("chatglm-6b", 6_173_286_400),
        ("chatglm2-6b", 6_243_584_000),
        ("glm-4-9b", 9_399_951_360),
        ("glm-4-9b-0414", 9_400_279_040),
        ("glm-4-32b-0414", 32_566_081_536),
        ("glm-edge-1.5b-chat", 1_593_427_968),
    ],
)
def test_parameters_of_releases(name: str, count: int) -> None:
    geometry = read_geometry(name)
    assert geometry.num_parameters == count
    family = PRESETS[name].family
    with torch.device("meta"):
        model = build_model(native_config(official_values(geometry), family))
    assert model.num_parameters() == count


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "glm-tiny"])
def test_every_release_is_known_without_files(name: str) -> None:
    for source in (name, f"THUDM/{name}", f"zai-org/{name}", f"modelscope:{name}"):
        geometry = read_geometry(source)
        assert geometry.num_layers in (28, 40, 61)
        assert geometry.is_first == (PRESETS[name].family is Family.CHATGLM)


def test_names_of_quantized_releases() -> None:
    assert read_geometry("THUDM/chatglm2-6b-int4").quantization == "int4"
    assert read_geometry("THUDM/chatglm-6b-int8").quantization == "int8"


def test_sizes_of_a_folder_need_no_weights(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_base / "config.json").read_text())
    geometry = read_geometry(str(tmp_path))
    assert (geometry.num_layers, geometry.hidden_size, geometry.num_kv_heads) == (2, 32, 2)
    assert read_geometry("glm-tiny").num_parameters < 10_000_000


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`model.source` is `chatglm2-7b`.*Did you mean.*config.json"):
        read_geometry("chatglm2-7b")
    with pytest.raises(ConfigError, match=r"someone/chatglm2-6b"):
        read_geometry("someone/chatglm2-6b")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_geometry(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "devices", "size", "host"),
    [
        ("4x80GB", 4, 80, None),
        ("1x8gb", 1, 8, None),
        ("2x8x80GB + 512GB", 16, 80, 512),
        ("cpu:24GB", 1, 24, None),
        ("1x11.5GiB", 1, 11.5, None),
    ],
)
def test_hardware_is_read(text: str, devices: int, size: float, host: int | None) -> None:
    found = parse_hardware(text)
    assert (found.num_devices, found.device_bytes) == (devices, size * GIB)
    assert found.host_bytes == (None if host is None else host * GIB)
    assert found.device == ("cpu" if text.startswith("cpu") else "cuda")


@pytest.mark.parametrize("text", ["80GB", "4x", "0x80GB", "4x0GB", "cpu:0GB", "gpu:4", "four cards"])
def test_other_hardware_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"`hardware` is .*GPUSxSIZE.*cpu:SIZE"):
        parse_hardware(text)


def test_this_machine_is_detected() -> None:
    found = detect_hardware("cpu")
    assert found.device == "cpu"
    assert GIB < found.device_bytes == host_memory_bytes()


def test_the_batch_is_that_of_the_recipe() -> None:
    batch = work_of("model=chatglm2-6b", "+recipe=ptuning").batch
    assert (batch.rows, batch.accumulation, batch.length) == (1, 16, 64 + 128 + 1)
    assert (batch.num_labels, batch.eval_rows, batch.is_padded) == (129, 8, False)
    long = work_of("model=chatglm2-6b", "+recipe=ptuning", length=8192).batch
    assert (long.length, long.num_labels) == (8192, 129)
    words = ("data.packing=true", "data.packing_length=1024", "trainer.per_device_train_batch_size=2")
    packed = work_of("model=chatglm2-6b", "+recipe=full", *words).batch
    assert (packed.length, packed.num_labels, packed.is_padded) == (1024, 2 * 1023, True)


@pytest.mark.parametrize(
    ("words", "hardware", "size", "autocast"),
    [
        (("+recipe=full",), "1x80GB", 4, True),
        (("+recipe=full",), "cpu:64GB", 4, False),
        (("+recipe=full", "deepspeed=zero2"), "4x80GB", 2, False),
        (("+recipe=full", "deepspeed=zero2", "trainer.precision=fp32"), "4x80GB", 4, False),
        (("+recipe=ptuning",), "1x80GB", 2, False),
        (("+recipe=ptuning",), "cpu:64GB", 2, False),
        (("+recipe=ptuning", "model.dtype=float32"), "1x80GB", 4, False),
        (("+recipe=lora", "model.dtype=float32", "trainer.precision=bf16"), "1x80GB", 4, True),
    ],
)
def test_types_follow_loading_and_precision(words, hardware: str, size: int, autocast: bool) -> None:
    work = work_of("model=chatglm2-6b", *words, hardware=parse_hardware(hardware))
    assert (work.weight_bytes, work.autocast) == (size, autocast)


def test_small_float16_models_are_float32_on_a_cpu(tmp_path: Path, tiny_base: Path) -> None:
    text = (tiny_base / "config.json").read_text().replace("float32", "float16")
    (tmp_path / "config.json").write_text(text)
    words = (f"model={tmp_path}", "+recipe=ptuning")
    assert work_of(*words, hardware=parse_hardware("cpu:8GB")).weight_bytes == 4
    assert work_of(*words).weight_bytes == 2


def test_trained_numbers() -> None:
    full = work_of("model=chatglm2-6b", "+recipe=full")
    assert num_trained(full) == 6_243_584_000
    prefix = work_of("model=chatglm2-6b", "+recipe=ptuning")
    assert num_trained(prefix) == 1_835_008  # as counted in benchmarks/results/ptuning_6b_shape.md
    lora = work_of("model=chatglm2-6b", "+recipe=lora")
    assert num_trained(lora) == 28 * 8 * (3 * 4096 + 4096 + 2 * 256)


def test_trained_numbers_are_those_of_the_modules() -> None:
    from glmtune.prefix.encoder import PrefixEncoder, prefix_shape

    for name, family in (("chatglm-6b", Family.CHATGLM), ("chatglm2-6b", Family.CHATGLM2)):
        words = (f"model={name}", "+recipe=ptuning", "prefix.prefix_projection=true")
        work = work_of(*words)
        config = native_config(official_values(work.geometry), family)
        with torch.device("meta"):
            inner = 4096 if name == "chatglm-6b" else None
            encoder = PrefixEncoder(
                prefix_shape(config), pre_seq_len=128, hidden_size=4096, embedding_width=inner
            )
        own = sum(weight.numel() for weight in encoder.parameters())
        assert num_trained(work) == own
        assert num_trained(work_of(*words, "prefix.gate=true")) == own + 28 * 32


def test_a_quantized_base_is_as_large_as_its_tensors() -> None:
    from glmtune.quantization.layers.apply import quantize_model

    geometry = read_geometry("glm-tiny")
    for method in ("int8", "int4", "int4-g32-asym"):
        config = plan_settings("+recipe=ptuning", f"quantization={method}")
        work = workload_of(config, geometry, parse_hardware("cpu:8GB"))
        model = build_model(native_config(official_values(geometry), Family.CHATGLM2))
        quantize_model(model, method)
        assert math.isclose(
            base_bytes(work), sum(weight.nbytes for weight in model.parameters()), rel_tol=1e-6
        )


@pytest.mark.parametrize("method", [None, "int4", "int4-g32-asym"])
def test_an_int8_embedding_and_head_are_as_large_as_their_tensors(method: str | None) -> None:
    from glmtune.quantization.layers.apply import quantize_model
    from glmtune.quantization.layers.embeddings import round_embeddings

    words = ["+recipe=ptuning", "quantization_embeddings=int8"] + (
        [f"quantization={method}"] if method else []
    )
    for is_first in (False, True):
        geometry = read_geometry("glm-tiny")
        if is_first:
            geometry = dataclasses.replace(
                geometry, is_first=True, num_kv_heads=geometry.num_heads, is_tied=True, vocab_size=4864
            )
        work = workload_of(plan_settings(*words), geometry, parse_hardware("cpu:8GB"))
        family = Family.CHATGLM if is_first else Family.CHATGLM2
        model = build_model(native_config(official_values(geometry), family))
        if method is not None:
            quantize_model(model, method)
        round_embeddings(model)
        held = sum(weight.nbytes for weight in model.parameters())
        assert math.isclose(base_bytes(work), held, rel_tol=1e-6)


def test_what_an_int8_head_saves_where_it_decides() -> None:
    """GLM-4-9B in INT4: embedding and head are 2.3 GiB in bfloat16, 1.2 in INT8."""
    card = parse_hardware("1x8GB")
    words = ("model=glm-4-9b", "+recipe=ptuning", "quantization=int4")
    plain = work_of(*words, hardware=card)
    rounded = work_of(*words, "quantization_embeddings=int8", hardware=card)
    saved = base_bytes(plain) - base_bytes(rounded)
    assert saved == pytest.approx(2 * 151552 * 4096 * (1 - 2 / 4096))
    assert base_bytes(rounded) < 5 * GIB < 6.1 * GIB < base_bytes(plain)


def test_a_folder_says_how_its_embedding_is_stored(oracles: Path, tmp_path: Path) -> None:
    from glmtune.quantization.files.write import QuantizeJob, quantize_checkpoint

    assert read_geometry(str(oracles / "v1" / "int4_embeddings")).embeddings == "int4"
    assert read_geometry(str(oracles / "v1" / "int4")).embeddings is None
    source = str(oracles / "v2" / "checkpoint_bin")
    quantize_checkpoint(QuantizeJob(source, "int4-g32", tmp_path / "e8", embeddings="int8"))
    geometry = read_geometry(str(tmp_path / "e8"))
    assert (geometry.quantization, geometry.embeddings) == ("int4-g32", "int8")
    for more in ((), ("quantization_embeddings=int8",)):
        work = work_of(
            f"model={tmp_path / 'e8'}", "+recipe=ptuning", *more, hardware=parse_hardware("cpu:8GB")
        )
        assert (work.method, work.embeddings) == ("int4-g32", "int8")
    for words, message in (
        (("deepspeed=zero3",), r"\(stage 3\), but `.*e8` is quantized \(int4-g32\), and DeepSpeed computes"),
        (("distributed=fsdp",), r"`distributed` is `fsdp`, but `.*e8` is quantized \(int4-g32\), and codes"),
    ):
        with pytest.raises(ConfigError, match=message):
            work_of(f"model={tmp_path / 'e8'}", "+recipe=ptuning", *words)
    with pytest.raises(ConfigError, match=r"`quantization_embeddings` is `int8`, but .* stored as `int4`"):
        work_of(
            f"model={oracles / 'v1' / 'int4_embeddings'}", "+recipe=ptuning", "quantization_embeddings=int8"
        )


def test_fsdp_divides_everything() -> None:
    alone = states_of(work_of("model=chatglm2-6b", "+recipe=full"))
    sharded = states_of(work_of("model=chatglm2-6b", "+recipe=full", "distributed=fsdp"))
    assert sharded.weights == alone.weights / 4
    assert sharded.gradients == alone.gradients / 4
    assert sharded.optimizer == alone.optimizer / 4


def test_every_optimizer_and_method_is_known() -> None:
    assert set(OPTIMIZER_BYTES) == set(OPTIMIZERS)
    for method in (*METHODS, *EXTERNAL):
        work = work_of("model=chatglm2-6b", "+recipe=ptuning", f"quantization={method}")
        assert 3.5e9 < base_bytes(work) < 7.2e9


def test_zero_divides_what_it_says() -> None:
    stages = {name: states_of(work_of("model=chatglm2-6b", "+recipe=full", *words)) for name, words in {
        "none": (), "1": ("deepspeed=zero1",), "2": ("deepspeed=zero2",), "3": ("deepspeed=zero3",),
        "2o": ("deepspeed=zero2_offload",), "3o": ("deepspeed=zero3_offload",),
    }.items()}  # fmt: skip
    count = 6_243_584_000
    assert (stages["none"].weights, stages["none"].gradients, stages["none"].optimizer) == (
        4 * count, 4 * count, 8 * count,
    )  # fmt: skip
    assert (stages["1"].weights, stages["1"].gradients, stages["1"].optimizer) == (
        2 * count,
        2 * count,
        3 * count,
    )
    assert (stages["2"].gradients, stages["2"].optimizer) == (2 * count / 4, 12 * count / 4)
    assert stages["3"].weights == 2 * count / 4
    assert (stages["2o"].optimizer, stages["2o"].gradients) == (0, 0)
    assert stages["2o"].host == 12 * count / 4 + 2 * count / 4
    assert (stages["3o"].weights, stages["3o"].host) == (0, 12 * count / 4 + 2 * 2 * count / 4)


def test_settings_that_contradict_the_model_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`tune` is `full`, but `THUDM/chatglm2-6b-int4` is quantized"):
        work_of("model=THUDM/chatglm2-6b-int4", "+recipe=full")
    with pytest.raises(ConfigError, match=r"`quantization` is `int8`, but .* is stored as `int4`"):
        work_of("model=THUDM/chatglm2-6b-int4", "+recipe=ptuning", "quantization=int8")
    with pytest.raises(ConfigError, match=r"`lora.targets` names `qkv`.*q_proj"):
        work_of("model=chatglm2-6b", "+recipe=lora", "+lora.targets=[qkv]")
    with pytest.raises(ConfigError, match=r"`launch.num_processes` is 8, but a machine has 4 GPUs"):
        work_of("model=chatglm2-6b", "+recipe=full", "launch.num_processes=8")
