"""Models split by layers: who lies where, what is refused, and that a split model computes the same."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from glmtune.errors import ConfigError
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.reading import Before
from glmtune.loading import load_base, load_model, load_model_on_gpus
from glmtune.models.load import build_model, load_config
from glmtune.models.placement import Placement, parse_placement, plan_placement
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape

GIB = 2**30
IDS = torch.arange(5, 25)[None]


def gpus(monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
    """Let PyTorch see GPUs with so many bytes free."""
    seen = SimpleNamespace(
        is_available=lambda: bool(free),
        device_count=lambda: len(free),
        mem_get_info=lambda device: (free[device.index], free[device.index]),
    )
    monkeypatch.setattr(torch, "cuda", seen)


def meta_model(folder: Path, **changes: int) -> nn.Module:
    config = load_config(folder, folder)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return build_model(config)


def counts(places: dict[str, torch.device]) -> dict[str, int]:
    layers = [str(device) for name, device in places.items() if ".layers." in name]
    return {device: layers.count(device) for device in dict.fromkeys(layers)}


def devices(*numbers: int) -> tuple[torch.device, ...]:
    return tuple(torch.device("cuda", number) for number in numbers)


class TestPlan:
    def test_even_counts_what_is_beside_the_layers(self, tiny_base: Path) -> None:
        model = meta_model(tiny_base, num_hidden_layers=12)
        size = sum(tensor.numel() * 2 for tensor in model.model.layers[0].parameters())
        beside = sum(tensor.numel() * 2 for tensor in model.parameters()) - 12 * size
        placement = Placement(devices(0, 1, 2), "auto", (GIB, GIB, GIB))
        places = plan_placement(model, placement, torch.float16)
        found = counts(places)
        assert sum(found.values()) == 12
        loads = [found.get(f"cuda:{number}", 0) * size for number in range(3)]
        loads[0] += beside
        assert max(loads) - min(loads) <= max(size, beside)
        ends = ("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb")
        assert {str(places[name]) for name in ends} == {"cuda:0"}
        order = [places[f"model.layers.{layer}"].index for layer in range(12)]
        assert order == sorted(order), "a hidden state crosses to the next device once"

    def test_sizes_follow_capacity_and_sequential_fills_up(self, tiny_base: Path) -> None:
        model = meta_model(tiny_base, num_hidden_layers=12)
        size = sum(tensor.numel() * 4 for tensor in model.model.layers[0].parameters())
        beside = sum(tensor.numel() * 4 for tensor in model.parameters()) - 12 * size
        uneven = Placement(devices(0, 1), "auto", (beside + 4 * size, 12 * size))
        assert counts(plan_placement(model, uneven, torch.float32))["cuda:1"] >= 8
        first = Placement(devices(0, 1), "sequential", (beside + 9 * size + 4096, 12 * size))
        assert counts(plan_placement(model, first, torch.float32)) == {"cuda:0": 9, "cuda:1": 3}

    def test_too_small(self, tiny_base: Path) -> None:
        placement = Placement(devices(0, 1), "auto", (2000, 3000))
        with pytest.raises(
            ConfigError, match=r"The model needs .* GB .*the 2 devices have room for 0.0, 0.0 GB"
        ):
            plan_placement(meta_model(tiny_base), placement, torch.float32)

    def test_codes_count_as_bytes(self, tiny_base: Path) -> None:
        model = load_base(tiny_base, device="cpu", quantization="int8")
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.model.layers[0].parameters())
        whole = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
        tight = Placement(devices(0, 1), "sequential", (whole - size + 2048, size + 2048))
        assert counts(plan_placement(model, tight, model.dtype)) == {"cuda:0": 1, "cuda:1": 1}


class TestWhatUsersWrite:
    def test_auto(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpus(monkeypatch, 10 * GIB, 20 * GIB)
        placement = parse_placement("auto")
        assert placement == Placement(devices(0, 1), "auto", (9 * GIB, 18 * GIB))
        limited = parse_placement("balanced", max_memory={1: "8GiB", "cpu": "30GiB"})
        assert limited == Placement(devices(1), "balanced", (8 * GIB,))
        assert parse_placement("auto", num_gpus=1) == torch.device("cuda")
        assert parse_placement(1) == parse_placement("cuda:1") == torch.device("cuda:1")
        assert parse_placement({"": 0}) == torch.device("cuda:0")

    def test_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpus(monkeypatch)
        assert parse_placement("auto") == torch.device("cpu")
        with pytest.raises(ConfigError, match=r"`num_gpus` is 2, but PyTorch sees 0 here"):
            load_model_on_gpus("glm-tiny", num_gpus=2)
        with pytest.raises(ConfigError, match=r"`model.device` is `cuda:1`, but PyTorch sees 0 CUDA devices"):
            parse_placement({"lm_head": 0, "model": "cuda:1"} | {"lm_head": "cuda:1"})

    @pytest.mark.parametrize(
        ("device_map", "words"),
        [
            ("balanced_low_0", r"must be one of auto, balanced, sequential"),
            ({"a": 0, "b": "disk"}, r"names the device `disk`.*nothing is put there"),
            ({"a": 0, "b": "cpu"}, r"mixes cuda:0 and cpu, .*copied to a GPU at every token"),
            ({}, r"`device_map` is empty"),
        ],
    )
    def test_refused(self, device_map: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
        gpus(monkeypatch, GIB, GIB)
        with pytest.raises(ConfigError, match=words):
            parse_placement(device_map)

    def test_twice(self, tiny_base: Path) -> None:
        with pytest.raises(ConfigError, match=r"say the same thing twice"):
            load_model(tiny_base, device="cpu", device_map="auto")
        with pytest.raises(ConfigError, match=r"`max_memory` is given without `device_map`"):
            load_model(tiny_base, max_memory={0: "1GiB"})
        with pytest.raises(ConfigError, match=r"Give one of the two"):
            load_model(tiny_base, device_map={"": "cpu"}, max_memory={0: "1GiB"})


OFFICIAL_MAP = {
    "transformer.embedding.word_embeddings": "cpu:0",
    "transformer.encoder.final_layernorm": "cpu:0",
    "transformer.output_layer": "cpu:0",
    "transformer.rotary_pos_emb": "cpu:0",
    "transformer.encoder.layers.0": "cpu:0",
    "transformer.encoder.layers.1": "cpu:1",
}
"""As the official demos write them; the two devices are the CPU under two names, with every hook in place."""


class TestSplitModels:
    def test_a_map_of_the_official_demos(self, tiny_base: Path, tiny_tokenizer) -> None:
        whole = load_model(tiny_base, device="cpu")
        split = load_model(tiny_base, device_map=OFFICIAL_MAP)
        assert split.hf_device_map["model.layers.1"] == "cpu:1"
        assert len(split.model.layers[1]._forward_pre_hooks) == 1
        torch.testing.assert_close(split(IDS).logits, whole(IDS).logits, rtol=0, atol=0)
        asked = {"do_sample": False, "max_new_tokens": 6}
        expected, _ = whole.chat(tiny_tokenizer, "你好", **asked)
        assert split.chat(tiny_tokenizer, "你好", **asked)[0] == expected
        assert list(split.stream_chat(tiny_tokenizer, "你好", **asked))[-1][0] == expected
        assert copy.deepcopy(split).chat(tiny_tokenizer, "你好", **asked)[0] == expected

    def test_inputs_really_move(self, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        split = load_model(tiny_base, device_map=OFFICIAL_MAP)
        moved: list[tuple[str, tuple[str, ...]]] = []

        def send(value: Any, device: torch.device, skip_keys: Any = ()) -> Any:
            kept = tuple(value) if isinstance(value, dict) else ()
            moved.append((str(device), tuple(name for name in kept if name not in skip_keys)))
            return value

        monkeypatch.setattr("glmtune.models.placement.send_to_device", send)
        split(IDS)
        assert {device for device, _ in moved} == {"cpu:0", "cpu:1"}
        names = {name for device, kept in moved for name in kept if device == "cpu:1"}
        assert "position_embeddings" in names
        assert not names & {"cache", "past_key_values", "prefix_key_values"}

    def test_prefix_codes_and_the_engine(self, tiny_base: Path) -> None:
        models = [
            load_base(tiny_base, quantization="int8", **place)
            for place in ({"device": "cpu"}, {"device_map": OFFICIAL_MAP})
        ]
        torch.manual_seed(1)
        encoder = PrefixEncoder(prefix_shape(models[0].config), pre_seq_len=3)
        for model in models:
            attach_prefix(model, copy.deepcopy(encoder))
        with torch.no_grad():
            expected, found = (model(IDS).logits for model in models)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        hidden = [
            EngineModel(model).read([IDS[0].tolist()], [Before()], keep=True).last_hidden_BD
            for model in models
        ]
        torch.testing.assert_close(hidden[1], hidden[0], rtol=0, atol=0)

    def test_first_generation_with_its_tied_head(self, oracles: Path) -> None:
        folder = oracles / "v1" / "checkpoint_bin"
        whole = load_base(folder, device="cpu", dtype="float32")
        layers = whole.config.num_hidden_layers
        places = {f"transformer.layers.{layer}": f"cpu:{layer % 2}" for layer in range(layers)}
        places |= {
            "transformer.word_embeddings": "cpu:0",
            "transformer.final_layernorm": "cpu:0",
            "lm_head": "cpu:0",
        }
        split = load_base(folder, device_map=places, dtype="float32")
        ids = torch.tensor([[7, 8, 9, whole.config.gmask_token_id, whole.config.bos_token_id, 11]])
        torch.testing.assert_close(split(ids).logits, whole(ids).logits, rtol=0, atol=0)

    def test_it_is_not_moved_as_a_whole(self, tiny_base: Path) -> None:
        split = load_model(tiny_base, device_map=OFFICIAL_MAP)
        for move in (lambda: split.to("cpu"), split.cuda):
            with pytest.raises(ConfigError, match=r"split over cpu:0, cpu:1, so it cannot be moved"):
                move()
        assert split.half().dtype == torch.float16

    def test_weights_are_read_to_their_devices(self, tiny_base: Path) -> None:
        from glmtune.models.placement import allocate

        model = meta_model(tiny_base)
        placement = parse_placement(OFFICIAL_MAP)
        assert isinstance(placement, Placement)
        places = plan_placement(model, placement, torch.float32)
        places["model.layers.1"] = torch.device("meta")  # a device of which one can tell that it was another
        allocate(model, places, torch.float32)
        assert {tensor.device.type for tensor in model.model.layers[1].parameters()} == {"meta"}
        assert {tensor.device.type for tensor in model.model.layers[0].parameters()} == {"cpu"}

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"lm_head": "cpu:1"}, r"embedding, final norm and head must lie on one"),
            ({"transformer.encoder.layers.9": "cpu:1"}, r"names `model.layers.9`, but the model has no such"),
        ],
    )
    def test_maps_that_do_not_fit(self, tiny_base: Path, changes: dict[str, str], words: str) -> None:
        asked = {
            name: place
            for name, place in OFFICIAL_MAP.items()
            if "output" not in name or not changes.get("lm_head")
        }
        with pytest.raises(ConfigError, match=words):
            load_model(tiny_base, device_map={**asked, **changes})

    def test_a_map_that_leaves_a_layer_out(self, tiny_base: Path) -> None:
        asked = {name: place for name, place in OFFICIAL_MAP.items() if not name.endswith("layers.0")}
        with pytest.raises(ConfigError, match=r"says nothing of `model.layers.0`"):
            load_model(tiny_base, device_map=asked)
