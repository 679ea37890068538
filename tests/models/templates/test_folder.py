"""Chat templates of folders: ids are transformers', answers are found exactly, or the template is refused."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from glmtune.errors import DataError
from glmtune.messages import Message
from glmtune.models.templates import marked
from glmtune.models.templates.folder import FolderTemplate, folder_template
from glmtune.models.templates.renderer import template_for
from glmtune.models.tokenizers.glm4 import ChatGLM4Tokenizer
from tests.models.templates.chat_folders import FORMS, REFUSED, chat_tokenizer, theirs

NAMES = ChatGLM4Tokenizer.COMMANDS
ASKED = Message("user", "How many legs does a cat have?")
TALK = [
    ASKED,
    Message("assistant", "Four legs."),
    Message("user", "x = 1\n\n\ny = 22\n你好 😀"),
    Message("assistant", "我们去公园散步。"),
    Message("user", "And then?"),
]
TOOL = {"name": "clock", "description": "tells the time", "parameters": {"type": "object", "properties": {}}}
KEEPING = ["roles", "system-first", "tools-in-message", "hiding", "always-asks"]
"""Forms in which an earlier answer is the same tokens as when it was written."""


def as_dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [
        {"role": each.role, "content": each.content} | ({"metadata": each.metadata} if each.metadata else {})
        for each in messages
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("turns", [1, 3, 5])
def test_prompts_are_the_ids_of_transformers(form: str, turns: int, tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS[form])
    for messages in (TALK[:turns], [Message("system", "Be brief."), *TALK[:turns]]):
        if form == "rounds" and messages[0].role == "system":
            continue
        expected = theirs(tmp_path).apply_chat_template(
            as_dicts(messages), add_generation_prompt=True, return_dict=False
        )
        assert template_for(ours).encode_prompt(ours, messages) == expected
        assert (
            ours.apply_chat_template(as_dicts(messages), add_generation_prompt=True, return_dict=False)
            == expected
        )


@pytest.mark.parametrize("form", ["roles", "system-first", "tools-in-message", "thinking"])
def test_tools_reach_the_template_in_its_own_form(form: str, tmp_path: Path) -> None:
    ours, wrapped = chat_tokenizer(tmp_path, FORMS[form]), {"type": "function", "function": TOOL}
    template = template_for(ours)
    assert template.knows_tools
    given = [TOOL] if form in ("roles", "thinking") else [wrapped]
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}, *as_dicts([ASKED])]
    if form == "tools-in-message":
        messages[0]["tools"] = given
    expected = theirs(tmp_path).apply_chat_template(
        messages,
        tools=None if form == "tools-in-message" else given,
        add_generation_prompt=True,
        return_dict=False,
    )
    for tools in ([TOOL], [wrapped]):
        asked = [{"role": "system", "content": "Be brief."}, *as_dicts([ASKED])]
        found = ours.apply_chat_template(asked, tools=tools, add_generation_prompt=True, return_dict=False)
        assert found == expected
    # Without a system message none appears, but for the tools themselves.
    text = ours.apply_chat_template(as_dicts([ASKED]), tools=[TOOL], tokenize=False)
    assert text.count("<|system|>") == 1
    assert "tells the time" in text


@pytest.mark.parametrize("form", ["edge", "stripped", "rounds", "closed"])
def test_a_template_without_tools_refuses_them(form: str, tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS[form])
    assert not template_for(ours).knows_tools
    with pytest.raises(DataError, match="`clock`"):
        ours.apply_chat_template(as_dicts([ASKED]), tools=[TOOL])
    with pytest.raises(DataError, match="shows no tools; given: `clock`"):
        template_for(ours).announce_tools("", [TOOL])


def test_calls_and_results_stand_as_transformers_writes_them(tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS["roles"])
    template = template_for(ours)
    call = Message("assistant", template.call_text({"zone": "北京"}), "clock")
    messages = [ASKED, call, Message("observation", '{"time": "10:00"}')]
    expected = theirs(tmp_path).apply_chat_template(
        as_dicts(messages), add_generation_prompt=True, return_dict=False
    )
    assert template.encode_prompt(ours, messages) == expected
    called = [
        *as_dicts([ASKED]),
        {"role": "assistant", "content": None, "tool_calls": [
            {"type": "function", "function": {"name": "clock", "arguments": '{"zone": "北京"}'}}
        ]},
        {"role": "tool", "content": '{"time": "10:00"}'},
    ]  # fmt: skip
    assert ours.apply_chat_template(called, add_generation_prompt=True, return_dict=False) == expected
    # A call ends with the token that opens its result.
    assert template.encode_answer(ours, call)[-1] == ours.get_command("<|observation|>")
    ids, mask = template.encode_conversation(ours, [*messages, Message("assistant", "Ten.")])
    learnt = ours.decode([token for token, loss in zip(ids, mask, strict=True) if loss])
    assert learnt == 'clock\n{"zone": "北京"}<|observation|>\nTen.<|endoftext|>'


def test_a_template_that_calls_results_otherwise_is_given_its_own_name(tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS["results-of-tools"])
    talk = [ASKED, Message("assistant", "Wait."), Message("observation", "10:00")]
    assert "<|observation|>\n10:00" in template_for(ours).render(talk)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["<|user|>", "[gMASK]", "<|endoftext|>", "<think>", "</think>"])
def test_names_of_special_tokens_in_texts_are_text(form: str, name: str, tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS[form])
    template = template_for(ours)
    if "think" in name and form in ("thinking", "thinking-tools", "last-thoughts", "no-thoughts"):
        pytest.skip("the template cuts the text there")
    plain = template.encode_prompt(ours, [Message("user", "a b")])
    ids = template.encode_prompt(ours, [Message("user", f"a {name} b")])
    special = set(ours.all_special_ids) | {ours.get_command(each) for each in NAMES}
    assert [each for each in ids if each in special] == [each for each in plain if each in special]
    assert name in ours.decode([each for each in ids if each not in special])


def test_names_of_special_tokens_in_tools_and_calls_are_text(tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS["system-first"])
    template = template_for(ours)
    tool = {**TOOL, "description": "ends with <|user|> [gMASK]", "parameters": {"<|user|>": ["<sop>"]}}
    calls = Message("assistant", '{"a": "<|user|>"}', "clock")
    for messages in (
        [template.announce_tools("<|user|>", [tool]), ASKED],
        [ASKED, calls, Message("observation", "<|user|>")],
    ):
        ids = template.encode_prompt(ours, messages)
        assert ids.count(ours.get_command("<|user|>")) == 1
        assert ids.count(ours.get_command("[gMASK]")) == 1
        assert "<|user|>" in ours.decode([each for each in ids if each != ours.get_command("<|user|>")])


def test_tags_of_thoughts_in_a_question_are_text_where_they_are_tokens(tmp_path: Path) -> None:
    names = {"additional_special_tokens": ["<think>", "</think>"]}
    ours = chat_tokenizer(
        tmp_path, FORMS["kept-thoughts"], extra_special_tokens=names["additional_special_tokens"]
    )
    template = template_for(ours)
    opening, closing = ours.get_command("<think>"), ours.get_command("</think>")
    asked = Message("user", "<think>?</think> <think>")
    ids = template.encode_prompt(ours, [asked])
    assert ids.count(opening) == 1
    assert ids[-1] == opening
    assert closing not in ids
    # The model's own are tokens.
    answer = template.encode_answer(ours, Message("assistant", "<think>2 and 2</think>4"))
    assert answer.count(closing) == 1
    assert opening not in answer
    ids = template.encode_prompt(ours, [ASKED, Message("assistant", "<think>2</think>4"), asked])
    assert ids.count(opening) == 2
    assert ids.count(closing) == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("answer", ["Four legs.", " Four\nlegs", "四条腿。\n", "<|user|> is a role", "😀"])
def test_an_answer_is_what_stands_behind_the_prompt(form: str, answer: str, tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS[form])
    template = template_for(ours)
    said = Message("assistant", answer)
    ids, mask = template.encode_conversation(ours, [ASKED, said])
    prompt = template.encode_prompt(ours, [ASKED])
    assert ids == [*prompt, *template.encode_answer(ours, said)]
    assert mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    *written, end = ids[len(prompt) :]
    assert end == ours.end_id
    text = ours.decode(written)
    if "thoughts" in form or form.startswith("thinking"):
        text = text.removeprefix("\n</think>")
    assert text.strip() == answer.strip()
    whole = template.render([ASKED, said]) if not template.opens_thoughts else ""
    whole = whole.replace(marked.HIDDEN, "")
    assert not whole or whole.startswith(ours.decode(prompt) + ours.decode(written))


@pytest.mark.parametrize("form", KEEPING)
def test_all_turns_of_a_conversation_are_one_row(form: str, tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS[form])
    template = template_for(ours)
    talk = [Message("system", "Be brief."), *TALK, Message("assistant", "Last\n")]
    talk[2] = Message("assistant", "Four legs.", has_loss=False)
    ids, mask = template.encode_conversation(ours, talk)
    expected: Any = theirs(tmp_path).apply_chat_template(as_dicts(talk), return_dict=False)
    if form == "always-asks":  # which transformers leaves there
        assert expected.pop() == ours.get_command("<|assistant|>")
    assert ids == [*expected, ours.end_id]
    learnt = ours.decode([token for token, loss in zip(ids, mask, strict=True) if loss])
    assert learnt == "\n我们去公园散步。<|user|>\nLast\n<|endoftext|>"
    assert ids[: len(template.encode_prompt(ours, talk[:-1]))] == template.encode_prompt(ours, talk[:-1])
    assert template.one_row_per_conversation


@pytest.mark.parametrize("form", [form for form in FORMS if form not in (*KEEPING, "results-of-tools")])
def test_other_templates_have_a_row_for_every_answer(form: str, tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS[form])
    template = template_for(ours)
    assert not template.one_row_per_conversation
    with pytest.raises(DataError, match="cannot be trained on: earlier answers are other tokens"):
        template.encode_conversation(ours, TALK[:4])
    for end in (2, 4):
        prompt, answer = (
            template.encode_prompt(ours, TALK[: end - 1]),
            template.encode_answer(ours, TALK[end - 1]),
        )
        assert TALK[end - 1].content in ours.decode(answer)
        assert prompt == theirs(tmp_path).apply_chat_template(
            as_dicts(TALK[: end - 1]), add_generation_prompt=True, return_dict=False
        )


@pytest.mark.parametrize(
    "form", ["roles", "edge", "stripped", "closed", "rounds", "system-first", "always-asks"]
)
def test_a_cache_goes_on_with_the_ids_that_are_missing(form: str, tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS[form])
    template = template_for(ours)
    assert template.encode_continuation(ours, TALK[:1]) == template.encode_prompt(ours, TALK[:1])
    prompt = template.encode_prompt(ours, TALK[:1])
    answer = template.encode_answer(ours, TALK[1])[:-1]
    rest = template.encode_continuation(ours, TALK[:3])
    text = template.render(TALK[:3])
    assert ours.decode([*prompt, *answer, *rest]) == text


@pytest.mark.parametrize("form", ["thinking", "thinking-tools", "last-thoughts", "no-thoughts"])
def test_no_cache_is_kept_where_thoughts_are_dropped(form: str, tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS[form])
    with pytest.raises(DataError, match="renders earlier answers anew"):
        template_for(ours).encode_continuation(ours, TALK[:3])


THOUGHTFUL = {
    "roles": "\n<think>\n2 and 2\n</think>\nFour.",
    "edge": "<think>\n2 and 2\n</think>\nFour.",
    "thinking": "\n2 and 2\n</think>\nFour.",
    "kept-thoughts": "\n2 and 2\n</think>\nFour.",
    "last-thoughts": "\n<think>2 and 2</think>\nFour.",
    "no-thoughts": "<think>\n2 and 2\n</think>\nFour.",
}


@pytest.mark.parametrize("form", THOUGHTFUL)
def test_thoughts_are_a_part_of_what_the_model_writes(form: str, tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS[form])
    template = template_for(ours)
    answer = Message("assistant", "<think>\n2 and 2\n</think>\nFour.")
    *written, end = template.encode_answer(ours, answer)
    assert (ours.decode(written), end) == (THOUGHTFUL[form], ours.end_id)
    prompt = template.encode_prompt(ours, [ASKED])
    assert template.encode_conversation(ours, [ASKED, answer])[0] == [*prompt, *written, end]
    assert template.clean_answer(ours.decode(written)) == "Four."
    with pytest.raises(DataError, match="opens thoughts with `<think>` and never closes"):
        template.encode_answer(ours, Message("assistant", "<think>2 and"))


@pytest.mark.parametrize("form", ["thinking", "thinking-tools", "last-thoughts", "no-thoughts"])
def test_earlier_thoughts_are_not_fed_back(form: str, tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS[form])
    template = template_for(ours)
    talk = [ASKED, Message("assistant", "<think>\n2 and 2\n</think>\nFour."), Message("user", "So?")]
    expected = theirs(tmp_path).apply_chat_template(
        as_dicts(talk), add_generation_prompt=True, return_dict=False
    )
    assert template.encode_prompt(ours, talk) == expected
    assert "2 and 2" not in ours.decode(expected)
    given = [
        *as_dicts(talk[:1]),
        {"role": "assistant", "content": "Four.", "reasoning_content": "2 and 2"},
        *as_dicts(talk[2:]),
    ]
    assert "2 and 2" not in ours.apply_chat_template(given, add_generation_prompt=True, tokenize=False)


def test_a_template_that_keeps_thoughts_is_given_them(tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS["roles"])
    given = [
        *as_dicts([ASKED]),
        {"role": "assistant", "content": "Four.", "reasoning_content": "2 and 2"},
        *as_dicts([ASKED]),
    ]
    text = ours.apply_chat_template(given, add_generation_prompt=True, tokenize=False)
    assert "<|assistant|>\n<think>\n2 and 2\n</think>\nFour.<|user|>" in text
    given[0]["reasoning_content"] = "a user's"
    with pytest.raises(DataError, match="only `assistant` thinks"):
        ours.apply_chat_template(given)


@pytest.mark.parametrize("content", ["  two  blanks  ", "\n\nlines\n\n", "\t"])
@pytest.mark.parametrize("form", ["roles", "stripped", "edge", "closed"])
def test_blanks_at_the_ends_of_contents(form: str, content: str, tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS[form])
    messages = [Message("user", content), Message("assistant", content), Message("user", "x")]
    expected = theirs(tmp_path).apply_chat_template(
        as_dicts(messages), add_generation_prompt=True, return_dict=False
    )
    assert template_for(ours).encode_prompt(ours, messages) == expected


@pytest.mark.parametrize("kind", REFUSED)
def test_a_template_that_cannot_be_followed_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    source, words = REFUSED[kind]
    ours = chat_tokenizer(tmp_path, source)
    with pytest.raises(DataError, match=f"checkpoint's chat template.*{words}"):
        template_for(ours).encode_prompt(ours, [Message("user", "how  many legs")])


def test_a_template_that_reorders_turns_cannot_be_trained_on(tmp_path: Path) -> None:
    source = "{% for m in messages | reverse %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>"
    ours = chat_tokenizer(tmp_path, source)
    with pytest.raises(DataError, match="an answer does not stand behind the prompt"):
        template_for(ours).encode_answer(ours, TALK[1])
    opens = chat_tokenizer(tmp_path / "opens", source + "{% if add_generation_prompt %}\n<think>{% endif %}")
    with pytest.raises(DataError, match="an answer does not stand behind the prompt"):
        template_for(opens).encode_answer(opens, TALK[1])


def test_a_template_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marked, "RENDER_SECONDS", 0.2)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = FolderTemplate(loop, NAMES)
    with pytest.raises(DataError, match=r"takes longer than 0\.2 seconds for 1 messages"):
        template.render([ASKED])
    # Nothing of it is left: what comes next is rendered as ever.
    time.sleep(0.5)
    assert FolderTemplate(FORMS["edge"], NAMES).render([ASKED]).endswith("<|assistant|>\n")


def test_many_threads_are_each_given_their_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marked, "RENDER_SECONDS", 1.0)
    loop = FolderTemplate(None, NAMES)
    loop.source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    good, results = FolderTemplate(FORMS["edge"], NAMES), []

    def render(template: FolderTemplate) -> None:
        try:
            results.append(template.render([ASKED]))
        except DataError as error:
            results.append(str(error)[:50])

    threads = [threading.Thread(target=render, args=(each,)) for each in (loop, good, loop, good)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(each[:8] for each in results) == ["<|user|>"] * 2 + ["The chec"] * 2


def test_marks_in_a_text_are_text(tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS["system-first"])
    text = "\ue0000\ue001 and \ue000999999999\ue001"
    assert text in ours.decode(template_for(ours).encode_prompt(ours, [Message("user", text)]))
    tools = template_for(ours).announce_tools("", [{**TOOL, "description": text}])
    with pytest.raises(DataError, match="cannot be followed"):
        template_for(ours).encode_prompt(ours, [tools, ASKED])


def test_a_folder_without_a_template_takes_plain_text_alone(tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, None)
    template = template_for(ours)
    assert not template.knows_tools
    assert not template.one_row_per_conversation
    assert template.answer_opening == ""
    for ask in (
        lambda: template.render([ASKED]),
        lambda: template.encode_prompt(ours, [ASKED]),
        lambda: template.encode_answer(ours, TALK[1]),
    ):
        with pytest.raises(DataError, match="has no chat template, so it answers no chat messages"):
            ask()
    assert template.stop_ids(ours)[0] == ours.end_id


def test_of_several_templates_the_one_called_default_is_taken(tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS["edge"])
    ours.chat_template = {"default": FORMS["roles"], "rag": FORMS["edge"]}
    assert template_for(ours) is folder_template(
        FORMS["roles"], tuple(ours.command_names), tuple(ours.special_tokens_map.items())
    )


def test_a_template_can_write_special_tokens_by_their_usual_names(tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, FORMS["closed"])
    talk = TALK[:3]
    expected = theirs(tmp_path).apply_chat_template(
        as_dicts(talk), add_generation_prompt=True, return_dict=False
    )
    assert template_for(ours).encode_prompt(ours, talk) == expected
    assert expected.count(ours.end_id) == 3
    assert template_for(ours).encode_answer(ours, TALK[1]).count(ours.end_id) == 1


def test_a_prompt_can_begin_a_call(tmp_path: Path) -> None:
    roles = chat_tokenizer(tmp_path / "roles", FORMS["roles"])
    assert roles.decode(template_for(roles).call_opening(roles, "clock")) == "clock\n"
    thinking = chat_tokenizer(tmp_path / "thinking", FORMS["thinking-tools"])
    opening = template_for(thinking).call_opening(thinking, "clock")
    assert thinking.decode(opening) == "\n</think>\nclock\n"
    call = Message("assistant", '{"zone": 8}', "clock")
    written = thinking.decode(template_for(thinking).encode_answer(thinking, call)[:-1])
    assert written == '\n</think>\nclock\n{"zone": 8}'
