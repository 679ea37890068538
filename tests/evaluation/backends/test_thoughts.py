"""Models of folders in transformers' format in an evaluation: chat or not, and what they think first."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from evaluation.backend import Limits
from evaluation.backends.glm import GlmBackend
from evaluation.backends.prompt_encoder import PromptEncoder, is_chat_model
from evaluation.backends.vllm_engine import VllmBackend
from evaluation.extraction.text import thinks, without_thinking
from evaluation.sample import Completion, Prompt
from glmtune.loading import load_model, load_tokenizer
from glmtune.messages import Message
from glmtune.models.releases.families import Family
from tests.evaluation.backends.test_vllm_engine import FakeLLM, FakeParameters
from tests.models.templates.chat_folders import FORMS, chat_tokenizer
from tests.models.transformers_folders import make_folder

ASKED = Prompt(turns=(Message("user", "Which?\nA. one\nB. two"),))
PLAIN = Prompt(text="1 + 1 =")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("folders")
    forms = {**FORMS, "none": None}
    return {
        form: chat_tokenizer(folder / form, forms[form]) for form in ("roles", "edge", "thinking", "none")
    }


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> GlmBackend:
    folder = str(make_folder(tmp_path_factory.mktemp("models") / "glm-z1", "glm-z1"))
    return GlmBackend(load_model(folder, device="cpu"), load_tokenizer(folder))


def test_a_folder_with_a_chat_template_is_a_chat_model(
    tokenizers: dict[str, Any], thinking: GlmBackend
) -> None:
    assert is_chat_model("any-base", Family.TRANSFORMERS)
    assert not is_chat_model("any-chat", Family.TRANSFORMERS, has_template=False)
    assert [PromptEncoder(each).has_chat_template for each in tokenizers.values()] == [
        True,
        True,
        True,
        False,
    ]
    assert thinking.identity.is_chat


def test_a_folder_without_one_is_none(tmp_path: Any) -> None:
    folder = make_folder(tmp_path / "base", "glm")
    (folder / "chat_template.jinja").unlink()
    model, tokenizer = load_model(str(folder), device="cpu"), load_tokenizer(str(folder))
    assert not GlmBackend(model, tokenizer).identity.is_chat
    assert GlmBackend(model, tokenizer, is_chat=True).identity.is_chat


@pytest.mark.parametrize("form", ["roles", "edge", "thinking"])
def test_prompts_are_the_templates_own(form: str, tokenizers: dict[str, Any]) -> None:
    ours = tokenizers[form]
    encoder = PromptEncoder(ours, system="Be brief.")
    expected = ours.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASKED.turns[0].content}],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert list(encoder.ids(ASKED)) == expected
    assert list(encoder.ids(PLAIN)) == ours(PLAIN.text)["input_ids"]


@pytest.mark.parametrize("form", ["roles", "edge", "thinking"])
def test_choices_stand_behind_empty_thoughts(form: str, tokenizers: dict[str, Any]) -> None:
    ours = tokenizers[form]
    encoder = PromptEncoder(ours)
    context, choices = encoder.choice_ids(ASKED, ["A", "B"])
    assert [ours.decode([each]) for each in choices] == ["A", "B"]
    ends = {"roles": "<|assistant|>\n", "edge": "<|assistant|>\n", "thinking": "<think>\n</think>\n"}
    assert ours.decode(list(context)).endswith(ends[form])


COMPLETIONS = {
    "A or B?\n</think>\nB": ("B", "eos"),
    "A or B? It may be A": ("", "eos"),
    "Question: A?\n</think>\nB\nQuestion: next": ("B", "stop"),
}


@pytest.mark.parametrize("text", COMPLETIONS)
def test_completions_tell_thoughts_from_answers(text: str, thinking: GlmBackend, monkeypatch: Any) -> None:
    asked: list[dict[str, Any]] = []

    def generate(prompts: Any, **options: Any) -> Iterator[Any]:
        asked.append(options)
        for index in range(len(prompts)):
            yield SimpleNamespace(
                index=index, text=text, stop_reason="eos", num_prompt_tokens=3, num_new_tokens=9
            )

    monkeypatch.setattr(thinking._engine, "generate", generate)
    ((_, completion),) = thinking.generate([ASKED], Limits(32, stop=("\nQuestion:",)))
    answer, reason = COMPLETIONS[text]
    assert thinks(completion.text)
    assert (without_thinking(completion.text).strip(), completion.stop_reason) == (answer, reason)
    assert asked[0]["stop"] == ()  # one within the thoughts would end them
    ((_, plain),) = thinking.generate([PLAIN], Limits(32, stop=("\nQuestion:",)))
    assert plain.text == text
    assert asked[1]["stop"] == ("\nQuestion:",)


def test_an_answer_really_cut_within_its_thoughts_is_none(thinking: GlmBackend) -> None:
    ((_, completion),) = thinking.generate([ASKED], Limits(4))
    assert completion.text.startswith("<think>")
    assert without_thinking(completion.text) == ""


def test_other_models_complete_as_before(tokenizers: dict[str, Any]) -> None:
    completion = Completion("\nQuestion: x", "eos", 1, 2)
    assert PromptEncoder(tokenizers["roles"]).completed(ASKED, completion, ("\nQuestion:",)) is completion


def test_tags_that_are_special_tokens_are_text_of_a_completion(tmp_path: Any) -> None:
    ours = chat_tokenizer(tmp_path, FORMS["thinking"], extra_special_tokens=["<think>", "</think>"])
    ids = [*ours.text_ids("2"), ours.get_command("</think>"), *ours.text_ids("4"), ours.end_id]
    assert PromptEncoder(ours).decode(ids) == "2</think>4"


def test_vllm_is_asked_without_stop_texts_and_cut_behind_the_thoughts(
    tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, FakeParameters  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    ours = tokenizers["thinking"]
    backend = VllmBackend("some/glm-z1", ours)
    assert backend.identity.is_chat
    text = "Question: A?\n\nQuestion: B?\n</think>\nB\n\nQuestion: next"
    FakeLLM.made.script = [*ours.text_ids(text), ours.end_id]  # type: ignore[attr-defined]
    ((_, completion),) = backend.generate([ASKED], Limits(200, stop=("\nQuestion:",)))
    assert completion.text == "<think>Question: A?\n\nQuestion: B?\n</think>\nB\n"
    assert completion.stop_reason == "stop"
    assert not VllmBackend("some/glm-base", tokenizers["none"]).identity.is_chat
