"""`torch.compile` as an option: the same answers, only where it was asked for, and a clear error without a compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from glmtune.errors import ConfigError
from glmtune.inference.engine.engine import Engine
from glmtune.inference.predict.generate import generate_ids
from glmtune.inference.settings import EngineSettings, GenerationSettings
from glmtune.loading import load_base, load_model, load_tokenizer
from glmtune.models.architectures import compiling
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "models"
PROMPTS = [[5, 9, 13, 7, 11], [8, 6], [12, 14, 20, 21, 9, 10, 6]]


def answers(model: Any, **settings: Any) -> list[tuple[int, ...]]:
    chosen = GenerationSettings(max_new_tokens=6, batch_size=2, **settings)
    found = generate_ids(model, PROMPTS, chosen, stop_ids=[2], pad_id=3)
    return [answer.token_ids for answer in sorted(found, key=lambda answer: answer.index)]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Trace as the compiler does, but run what was traced as it is: no minutes of compiling."""
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", keep)
    torch._dynamo.reset()
    return graphs


@pytest.mark.parametrize(
    ("with_prefix", "quantization"), [(True, None), pytest.param(False, "int4", marks=pytest.mark.slow)]
)
def test_predictions_are_the_same(
    tiny_base: Path, traced: list[Any], with_prefix: bool, quantization: str | None
) -> None:
    model: Any = load_base(tiny_base, device="cpu", dtype="float32", quantization=quantization)
    if with_prefix:
        torch.manual_seed(1)
        attach_prefix(model, PrefixEncoder(prefix_shape(model.config), pre_seq_len=4))
    expected = answers(model)
    assert not traced
    assert answers(model, compile=True) == expected
    assert traced


@pytest.mark.slow
def test_the_first_generation(traced: list[Any]) -> None:
    model: Any = load_base(GOLDEN / "chatglm", device="cpu", dtype="float32")
    marks = [model.config.gmask_token_id, model.config.bos_token_id]
    prompts = [[5, 9, 13, *marks], [8, 6, *marks]]
    results = []
    for compiled in (False, True):
        chosen = GenerationSettings(max_new_tokens=4, compile=compiled)
        found = generate_ids(model, prompts, chosen, stop_ids=[2], pad_id=3)
        results.append(sorted((answer.index, answer.token_ids) for answer in found))
    assert results[0] == results[1]
    assert traced


@pytest.mark.slow
def test_chat_decodes_compiled(traced: list[Any]) -> None:
    model: Any = load_model("glm-tiny", device="cpu", dtype="float32", quantization="int4")
    tokenizer = load_tokenizer("glm-tiny")
    options: dict[str, Any] = {"do_sample": False, "max_length": 64}
    expected = model.chat(tokenizer, "3+5", **options)
    assert not traced
    assert model.chat(tokenizer, "3+5", compile=True, **options) == expected
    assert traced


def test_chat_obeys_or_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_model("glm-tiny", device="cpu", dtype="float32")
    tokenizer = load_tokenizer("glm-tiny")
    seen: dict[str, Any] = {}
    generate = type(model).generate

    def watched(self: Any, **settings: Any) -> Any:
        seen.update(settings)
        plain = {k: v for k, v in settings.items() if k not in ("cache_implementation", "compile_config")}
        return generate(self, **plain)

    monkeypatch.setattr(type(model), "generate", watched)
    model.chat(tokenizer, "3+5", compile=True, max_new_tokens=2)
    assert seen["cache_implementation"] == "static"
    assert seen["compile_config"].backend == compiling.BACKEND
    for wrong in ({"kv_cache": "int8"}, {"past_key_values": DynamicCache()}):
        with pytest.raises(ConfigError, match=rf"compile=True and `?{next(iter(wrong))}.*of fixed size"):
            model.chat(tokenizer, "3+5", compile=True, **wrong)
    with pytest.raises(ConfigError, match=r"`stream_chat` got compile=True.*compile_parts"):
        next(model.stream_chat(tokenizer, "3+5", compile=True))


def test_the_engine_compiles_what_sees_no_keys(tiny_base: Path, traced: list[Any]) -> None:
    def completed(model: Any, settings: EngineSettings) -> list[tuple[int, ...]]:
        engine = Engine(model, settings)
        found = engine.generate(PROMPTS, max_new_tokens=6, stop_ids=[2], decode=str)
        return [text.token_ids for text in sorted(found, key=lambda text: text.index)]

    model: Any = load_model(tiny_base, device="cpu", dtype="float32")
    expected = completed(model, EngineSettings())
    assert not traced
    assert completed(model, EngineSettings(compile=True)) == expected
    assert traced
    assert compiling.compile_parts(model) == 0  # done already


@pytest.mark.slow
def test_with_the_real_compiler() -> None:
    model: Any = load_model("glm-tiny", device="cpu", dtype="float32")
    expected = answers(model)
    assert answers(model, compile=True) == expected
    assert answers(model, compile=True) == expected


def test_without_a_compiler(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def nothing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", nothing)
    model: Any = load_model(tiny_base, device="cpu")
    with pytest.raises(
        ConfigError, match=r"`compile` is true, but torch.compile needs a C\+\+ compiler.*g\+\+"
    ):
        answers(model, compile=True)
    with pytest.raises(ConfigError, match=r"leave `compile` out"):
        Engine(model, EngineSettings(compile=True))
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(ConfigError, match=r"needs Triton on a GPU.*pip install triton"):
        compiling.check_compiler(torch.device("cuda"))


def test_a_cache_of_codes_has_no_fixed_size_as_beams_need() -> None:
    with pytest.raises(
        ConfigError, match=r"`generation.kv_cache` is int8, but `generation.compile=true` with"
    ):
        GenerationSettings(compile=True, kv_cache="int8", num_beams=2)
