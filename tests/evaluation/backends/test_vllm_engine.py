"""The vLLM backend with a module that answers in vLLM's shapes."""

from __future__ import annotations

import math
import sys
import types
from types import SimpleNamespace

import pytest

from evaluation.backend import Drawing, Limits
from evaluation.backends.vllm_engine import VllmBackend
from evaluation.evaluate import default_run_folder
from evaluation.running.fingerprint import fingerprint
from evaluation.sample import Prompt
from glmtune.errors import MissingExtraError
from tests.evaluation.doubles import make_task


class FakeLLM:
    """Continues a prompt with the tokens of a text, then with the end token; scores by a fixed rule."""

    made = None

    def __init__(self, model, **options):
        self.options = {"model": model, **options}
        config = SimpleNamespace(max_model_len=300, dtype="torch.bfloat16", quantization=None)
        self.llm_engine = SimpleNamespace(model_config=config)
        self.calls = []
        self.listed = {}
        self.script = []
        FakeLLM.made = self

    def generate(self, prompts, parameters, use_tqdm):
        assert not use_tqdm
        rows = [prompt["prompt_token_ids"] for prompt in prompts]
        self.calls.append((rows, parameters))
        each = parameters if isinstance(parameters, list) else [parameters] * len(rows)
        return [self._answer(row, own) for row, own in zip(rows, each, strict=True)]

    def _answer(self, row, parameters):
        place = next(
            (len(row) - cut for cut in range(len(row)) if row[cut:] == self.script[: len(row) - cut]), 0
        )
        tokens = self.script[place : place + parameters.max_tokens]
        reason = "stop" if tokens and tokens[-1] in (parameters.stop_token_ids or ()) else "length"
        scores = {token: SimpleNamespace(logprob=value) for token, value in self.listed.items()}
        last = {row[-1]: SimpleNamespace(logprob=-float(row[-1]))}
        return SimpleNamespace(
            outputs=[SimpleNamespace(token_ids=tokens, finish_reason=reason, logprobs=[scores])],
            prompt_logprobs=[None, *[{}] * (len(row) - 2), last],
        )


class FakeParameters(SimpleNamespace):
    def __init__(self, **values):
        super().__init__(**{"stop_token_ids": None, "max_tokens": 16, **values})


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, FakeParameters
    monkeypatch.setitem(sys.modules, "vllm", module)


def make(tokenizer, **options):
    backend = VllmBackend("some/chatglm2-folder", tokenizer, **options)
    return backend, FakeLLM.made


def test_without_vllm_the_error_names_the_extra(monkeypatch, tiny_tokenizer):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match=r"`backend=vllm`.*glmtune\[vllm\]"):
        VllmBackend("x", tiny_tokenizer)


def test_ids_go_in_and_text_comes_out(vllm, tiny_tokenizer):
    backend, engine = make(tiny_tokenizer, tensor_parallel_size=2)
    engine.script = [*tiny_tokenizer.text_ids("a warm red coat"), tiny_tokenizer.end_id]
    answers = dict(backend.generate([Prompt(text="The shop sells"), Prompt(text="Write")], Limits(60)))
    assert [answers[place].text for place in (0, 1)] == ["a warm red coat"] * 2
    assert answers[0].stop_reason == "eos"
    assert answers[0].num_new_tokens == len(engine.script)
    assert engine.calls[0][0][0] == [*tiny_tokenizer.prefix_ids, *tiny_tokenizer.text_ids("The shop sells")]
    assert engine.options["skip_tokenizer_init"] is True
    assert engine.options["tensor_parallel_size"] == 2
    assert backend.identity.engine == "vllm"
    assert backend.identity.dtype == "bfloat16"
    assert backend.max_context_tokens == 300


def test_drawn_answers_have_a_seed_of_their_own_in_every_round(vllm, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("evaluation.backends.vllm_engine.ROUND_TOKENS", 4)
    backend, engine = make(tiny_tokenizer)
    engine.script = tiny_tokenizer.text_ids("How many apples are left? There are many.") * 3
    prompts = [Prompt(text="问：", seed=5), Prompt(text="答：", seed=9)]
    list(backend.generate(prompts, Limits(8, ("nothing",), Drawing(0.8, top_p=0.9))))
    seeds = [[each.seed for each in parameters] for _, parameters in engine.calls]
    assert seeds == [[5, 9], [9, 13]]
    first = engine.calls[0][1][0]
    assert (first.temperature, first.top_p, first.top_k, first.max_tokens) == (0.8, 0.9, -1, 4)


def test_stop_strings_end_a_completion_between_rounds(vllm, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("evaluation.backends.vllm_engine.ROUND_TOKENS", 4)
    backend, engine = make(tiny_tokenizer)
    engine.script = tiny_tokenizer.text_ids("There are 12 - 7 = 5 apples left. Write a short text") * 3
    answers = dict(backend.generate([Prompt(text="问：")], Limits(60, ("Write", "nothing"))))
    assert answers[0].text == "There are 12 - 7 = 5 apples left. "
    assert answers[0].stop_reason == "stop"
    assert 1 < len(engine.calls) < 15


def test_the_limit_ends_a_completion(vllm, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("evaluation.backends.vllm_engine.ROUND_TOKENS", 4)
    backend, engine = make(tiny_tokenizer)
    engine.script = tiny_tokenizer.text_ids("How many apples are left? There are many.") * 3
    answers = dict(backend.generate([Prompt(text="问：")], Limits(10, ("nothing",))))
    assert answers[0].stop_reason == "length"
    assert answers[0].num_new_tokens == 10
    assert [parameters.max_tokens for _, parameters in engine.calls] == [4, 4, 2]


def test_choices_are_scored_and_unlisted_ones_looked_up(vllm, tiny_tokenizer):
    backend, engine = make(tiny_tokenizer)
    ids = [tiny_tokenizer.text_ids(f"问：{letter}")[-1] for letter in "1234"]
    engine.listed = {ids[0]: -0.5, ids[1]: -1.5, ids[3]: -2.5}
    scores = dict(backend.score_choices([Prompt(text="问："), Prompt(text="答：")], tuple("1234")))
    assert scores[0].logprobs == (-0.5, -1.5, -float(ids[2]), -2.5)
    assert scores[1].num_prompt_tokens == backend.count_tokens(Prompt(text="答："))
    assert not any(math.isinf(value) for value in scores[1].logprobs)
    [_, (rows, parameters)] = engine.calls
    assert [row[-1] for row in rows] == [ids[2]] * 2
    assert parameters.prompt_logprobs == 0


def test_a_folder_exported_again_is_another_model(vllm, tiny_tokenizer, tmp_path):
    """vLLM gives no access to the weights, so the folder it is given tells them apart."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "generation_config.json").write_text("{}")  # every parameter of a request is given
    (folder / "model.safetensors").write_bytes(bytes(100_000) + b"1")

    def identity():
        return VllmBackend(str(folder), tiny_tokenizer, name="mine").identity

    first = identity()
    assert len(first.weights_hash) == len(first.config_hash) == 16
    (folder / "README.md").write_text("words")
    (folder / "generation_config.json").write_text('{"temperature": 1}')
    assert identity() == first
    (folder / "model.safetensors").write_bytes(bytes(100_000) + b"2")
    second = identity()
    assert second.weights_hash != first.weights_hash
    assert second.config_hash == first.config_hash
    (folder / "config.json").write_text('{"rope_ratio": 4}')
    third = identity()
    assert third.weights_hash == second.weights_hash
    assert third.config_hash != second.config_hash
    task = make_task()
    places = {default_run_folder(fingerprint(task, each, 300)) for each in (first, second, third)}
    assert len(places) == 3
    assert VllmBackend("org/of-the-hub", tiny_tokenizer).identity.weights_hash == ""
