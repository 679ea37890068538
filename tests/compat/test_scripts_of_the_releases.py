"""What scripts written for the releases call on models and tokenizers: it runs, or says what to write."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import glmtune
from glmtune.errors import CheckpointError, ConfigError, DataError
from glmtune.loading import load_base, load_model
from glmtune.models.load import load_official
from glmtune.quantization.layers.linear import QuantizedLinear

GREEDY = {"do_sample": False, "max_new_tokens": 6}


class TestQuantize:
    @pytest.mark.parametrize(("bits", "method"), [(4, "int4"), (8, "int8")])
    def test_it_is_what_loading_gives(self, tiny_base: Path, tiny_tokenizer, bits: int, method: str) -> None:
        loaded = load_model(tiny_base, device="cpu", quantization=method)
        model = load_model(tiny_base, device="cpu")
        assert model.quantize(bits) is model
        assert model.quantization == method
        expected, found = loaded.state_dict(), model.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert model.is_base(load_base(tiny_base, device="cpu").fingerprint())
        assert (
            model.chat(tiny_tokenizer, "你好", **GREEDY)[0]
            == loaded.chat(tiny_tokenizer, "你好", **GREEDY)[0]
        )

    def test_codes_do_not_depend_on_a_cast_before(self, oracles: Path) -> None:
        folder = oracles / "v1" / "checkpoint_bin"
        at_once = load_base(folder, device="cpu", quantization="int4").state_dict()
        for dtype in ("float16", "float32"):
            later = load_base(folder, device="cpu", dtype=dtype).quantize(4).state_dict()
            assert all(torch.equal(later[n], at_once[n]) for n in later if later[n].dtype == torch.int8)

    def test_products_come_back_after_a_move(self, tiny_base: Path, tiny_tokenizer) -> None:
        model = load_model(tiny_base, device="cpu").quantize(8)

        def products() -> list[bool]:
            layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
            return [layer.product is not None for layer in layers]

        prepared = any(layer.product is not None for layer in _prepared(tiny_base))
        for cast in (model.float, model.to, lambda: model.to(torch.float32)):
            cast()
            assert not any(products())
            model.chat(tiny_tokenizer, "你好", **GREEDY)
            assert any(products()) == prepared

    def test_refused(self, tiny_base: Path) -> None:
        model = load_model(tiny_base, device="cpu")
        with pytest.raises(ConfigError, match=r"bits=3, but they must be 4 or 8"):
            model.quantize(3)
        model.quantize(4)
        with pytest.raises(
            ConfigError, match=r"`model.quantize\(8\)` was asked of a model.*already \(`int4`\)"
        ):
            model.quantize(8)
        with pytest.raises(ConfigError, match=r"needs a model that `glmtune.load_model` loaded"):
            load_official(tiny_base, device="cpu").quantize(4)


def _prepared(folder: Path) -> list[QuantizedLinear]:
    model = load_model(folder, device="cpu", quantization="int8", dtype="float32")
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


class TestCalls:
    @pytest.fixture(scope="class")
    def model(self, tiny_base: Path) -> Any:
        return load_model(tiny_base, device="cpu")

    def test_inputs(self, model, tiny_tokenizer) -> None:
        expected, history = model.chat(tiny_tokenizer, "你好", **GREEDY)
        for inputs in (
            tiny_tokenizer.build_chat_input("你好", history=[], role="user"),
            model.build_inputs(tiny_tokenizer, "你好"),
            tiny_tokenizer([tiny_tokenizer.build_prompt("你好")], return_tensors="pt"),
        ):
            out = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
            assert tiny_tokenizer.decode(out, skip_special_tokens=True).strip() == expected.strip()
        again = model.build_inputs(tiny_tokenizer, "好", history=history)
        asked, _ = model.chat(tiny_tokenizer, "好", history=history, **GREEDY)
        out = model.generate(**again, **GREEDY)[0, again["input_ids"].shape[1] :]
        assert tiny_tokenizer.decode(out, skip_special_tokens=True).strip() == asked.strip()

    def test_messages_of_later_releases(self, tiny_chatglm3_tokenizer) -> None:
        tokenizer = tiny_chatglm3_tokenizer
        history = [
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "好", "metadata": ""},
        ]
        ids = tokenizer.build_chat_input("问", history, role="observation")["input_ids"][0].tolist()
        assert tokenizer.get_command("<|observation|>") in ids
        assert ids[-1] == tokenizer.get_command("<|assistant|>")

    def test_streaming_with_a_cache(self, model, tiny_tokenizer) -> None:
        stream = model.stream_chat(
            tiny_tokenizer, "你好", history=[], past_key_values=None, return_past_key_values=True, **GREEDY
        )
        *_, (response, history, past) = stream
        *_, (following, _, _) = model.stream_chat(
            tiny_tokenizer, "好", history, past_key_values=past, return_past_key_values=True, **GREEDY
        )
        assert isinstance(response, str)
        assert isinstance(following, str)

    @pytest.mark.parametrize(
        "name", ["stream_generate", "process_response", "build_stream_inputs", "transformer"]
    )
    def test_what_is_called_otherwise(self, model, name: str) -> None:
        assert not hasattr(model, name)
        with pytest.raises(
            AttributeError, match=rf"`model.{name}` of the releases is not here. [A-Z]\w+ .*`"
        ):
            getattr(model, name)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = model.nothing

    def test_embeddings(self, model) -> None:
        model = copy.deepcopy(model)
        new = torch.nn.Embedding(*model.get_input_embeddings().weight.shape)
        model.set_input_embeddings(new)
        assert model.get_input_embeddings() is new


class TestChatPipeline:
    def test_as_modelscope_has_it(self, tiny_base: Path, tiny_tokenizer) -> None:
        pipe = glmtune.pipeline(task="chat", model=tiny_base, device="cpu")
        first = pipe({"text": "你好", "history": []}, **GREEDY)
        expected, history = load_model(tiny_base, device="cpu").chat(tiny_tokenizer, "你好", **GREEDY)
        assert first == {"response": expected, "history": history}
        lists = [list(turn) for turn in first["history"]]  # as JSON gives them back
        second = pipe({"text": "再说一遍", "history": lists, **GREEDY})
        assert len(second["history"]) == 2

    def test_a_loaded_model(self, tiny_base: Path, tiny_tokenizer) -> None:
        model = load_model(tiny_base, device="cpu")
        pipe = glmtune.pipeline("chat", model, tokenizer=tiny_tokenizer)
        assert pipe({"text": "你好"}, **GREEDY)["response"] == model.chat(tiny_tokenizer, "你好", **GREEDY)[0]
        with pytest.raises(ConfigError, match=r"`dtype` is given with a model that is loaded already"):
            glmtune.pipeline("chat", model, dtype="float32")

    def test_refused(self, tiny_base: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"`task` is `text-generation`.*Use|use `transformers.pipeline`"
        ):
            glmtune.pipeline("text-generation", tiny_base)
        with pytest.raises(ConfigError, match=r"`model_revision` is `v1.0.16`"):
            glmtune.pipeline("chat", tiny_base, model_revision="v1.0.16")
        with pytest.raises(DataError, match=r"takes a dictionary with `text`"):
            glmtune.pipeline("chat", tiny_base, device="cpu")("你好")  # type: ignore[arg-type]

    def test_ids_at_modelscope(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fetch(name: str) -> Path:
            raise CheckpointError(f"asked for {name}")

        monkeypatch.setattr("glmtune.models.releases.source.download_from_modelscope", fetch)
        with pytest.raises(CheckpointError, match=r"asked for ChatGLM-6B-Int8"):
            glmtune.pipeline("chat", "ZhipuAI/ChatGLM-6B-Int8", device="cpu")
