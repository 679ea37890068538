"""The prompt templates on a tiny tokenizer: layouts written out by hand, loss masks, refusals.

Where they differ from the released code on purpose: an answer that calls a tool ends with
``<|observation|>``, as in the conversations the model was trained on; the release's tuning script writes
the end id behind a conversation that stops there. A tool call is returned as text and never executed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmtune.errors import ConfigError, DataError
from glmtune.messages import Message
from glmtune.models.releases.families import Family
from glmtune.models.templates.renderer import TEMPLATES, render_prompt, template_for
from glmtune.models.templates.responses import split_messages
from glmtune.models.templates.roles import ChatGLM3Template
from glmtune.models.tokenizers.load import load_tokenizer_folder

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "prompts.json").read_text(encoding="utf-8"))[
    "cases"
]
USER, ANSWER = Message("user", "3 + 4?"), Message("assistant", "7")
CALL, RESULT = Message("assistant", "clock()", "clock"), Message("observation", "noon")


def tokenizer_of(name: str, folder: Path):
    if name in ("chatglm", "glm4"):
        folder = Path(__file__).parents[2] / "golden" / "tokenizers" / name
    return load_tokenizer_folder(folder, Family(name))


def spelled(tokenizer, parts: list[list[str]]) -> list[int]:
    ids: list[int] = []
    for kind, text in parts:
        ids += [tokenizer.get_command(text)] if kind == "command" else tokenizer.text_ids(text)
    return ids


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['template']}-{len(case['messages'])}")
def test_layouts(case, tiny_tokenizer_folder):
    tokenizer = tokenizer_of(case["template"], tiny_tokenizer_folder)
    template = template_for(tokenizer)
    messages = [Message(*item) for item in case["messages"]]
    assert template.render(messages) == case["text"]
    if "ids" in case:
        assert template.encode_prompt(tokenizer, messages) == spelled(tokenizer, case["ids"])
        chat = [{"role": item.role, "content": item.content, "metadata": item.metadata} for item in messages]
        encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        assert encoded["input_ids"] == spelled(tokenizer, case["ids"])


def test_every_supported_family_has_its_template(tiny_tokenizer):
    assert {family: template_for(family).name for family in Family} == {
        Family.CHATGLM: "chatglm",
        Family.CHATGLM2: "chatglm2",
        Family.CHATGLM2_32K: "chatglm2",
        Family.CODEGEEX2: "codegeex2",
        Family.CHATGLM3: "chatglm3",
        Family.CHATGLM3_32K: "chatglm3",
        Family.GLM4: "glm4",
        Family.TRANSFORMERS: "transformers",
    }
    assert template_for(tiny_tokenizer) is template_for("chatglm2") is TEMPLATES["chatglm2"]
    assert {name for name, template in TEMPLATES.items() if template.one_row_per_conversation} == {
        "chatglm3",
        "glm4",
    }
    with pytest.raises(ConfigError, match=r"family of the prompt template is `chatglm9`.*Valid:.*chatglm2"):
        template_for("chatglm9")


def test_render_prompt():
    pairs, messages = [("a", "b")], [Message("user", "a"), Message("assistant", "b")]
    assert (
        render_prompt("q", pairs)
        == render_prompt("q", messages)
        == "[Round 1]\n\n问：a\n\n答：b\n\n[Round 2]\n\n问：q\n\n答："
    )
    assert render_prompt("q", system="s") == "s\n\n[Round 1]\n\n问：q\n\n答："
    assert render_prompt("q", pairs, template="chatglm3").endswith("b<|user|>\nq<|assistant|>")
    assert render_prompt("def f(", template="codegeex2") == "def f("
    with pytest.raises(ConfigError, match=r"prompt template is `chatgml`.*Did you mean `chatglm"):
        render_prompt("q", template="chatgml")


def test_prompt_without_generation_prompt():
    assert TEMPLATES["chatglm2"].render([USER], generation_prompt=False) == "[Round 1]\n\n问：3 + 4?"
    assert TEMPLATES["chatglm3"].render([USER], generation_prompt=False) == "<|user|>\n3 + 4?"


def test_answers_end(tiny_tokenizer, tiny_chatglm3_tokenizer):
    two, three = tiny_tokenizer, tiny_chatglm3_tokenizer
    assert template_for(two).encode_answer(two, ANSWER) == [*two.text_ids("7"), 2]
    assert template_for(two).encode_answer(two, Message("assistant", "")) == [2]
    assert template_for(three).encode_answer(three, ANSWER) == [
        *three.text_ids("\n"),
        *three.text_ids("7"),
        2,
    ]
    assert template_for(three).encode_answer(three, CALL) == spelled(
        three, [["text", "clock\n"], ["text", "clock()"], ["command", "<|observation|>"]]
    )


@pytest.mark.parametrize("answer", ["7", "它是白色的。\n很好看。", "x = 1\n  y = 2"])
@pytest.mark.parametrize("name", ["chatglm2", "chatglm3"])
def test_an_answer_comes_back_from_its_ids(tiny_tokenizer_folder, name, answer):
    tokenizer = tokenizer_of(name, tiny_tokenizer_folder)
    template = template_for(tokenizer)
    ids = template.encode_answer(tokenizer, Message("assistant", answer))
    assert template.clean_answer(tokenizer.decode(ids[:-1])) == answer


def test_a_tool_call_comes_back_from_its_ids(tiny_chatglm3_tokenizer):
    template = TEMPLATES["chatglm3"]
    assert isinstance(template, ChatGLM3Template)
    ids = template.encode_answer(tiny_chatglm3_tokenizer, CALL)
    assert split_messages(tiny_chatglm3_tokenizer.decode(ids[:-1])) == (CALL,)


def test_codegeex2_keeps_blanks():
    assert TEMPLATES["codegeex2"].clean_answer("    return 1\n") == "    return 1\n"


def test_loss_falls_on_answers_and_on_what_ends_them(tiny_chatglm3_tokenizer):
    tokenizer = tiny_chatglm3_tokenizer
    messages = [Message("system", "s"), USER, CALL, RESULT, Message("assistant", "it is noon"), USER, ANSWER]
    ids, mask = template_for(tokenizer).encode_conversation(tokenizer, messages)
    parts = [
        (["command", "[gMASK]"], False),
        (["command", "sop"], False),
        (["command", "<|system|>"], False),
        (["text", "\n"], False),
        (["text", "s"], False),
        (["command", "<|user|>"], False),
        (["text", "\n"], False),
        (["text", "3 + 4?"], False),
        (["command", "<|assistant|>"], False),
        (["text", "clock\n"], True),
        (["text", "clock()"], True),
        (["command", "<|observation|>"], True),
        (["text", "\n"], False),
        (["text", "noon"], False),
        (["command", "<|assistant|>"], False),
        (["text", "\n"], True),
        (["text", "it is noon"], True),
        (["command", "<|user|>"], True),
        (["text", "\n"], False),
        (["text", "3 + 4?"], False),
        (["command", "<|assistant|>"], False),
        (["text", "\n"], True),
        (["text", "7"], True),
    ]
    expected_ids, expected_mask = [], []
    for part, loss in parts:
        expected_ids += spelled(tokenizer, [part])
        expected_mask += [loss] * (len(expected_ids) - len(expected_mask))
    assert ids == [*expected_ids, tokenizer.end_id]
    assert mask == [*expected_mask, True]


@pytest.mark.parametrize("answer", [ANSWER, CALL])
def test_a_conversation_is_its_prompt_and_its_answer(tiny_chatglm3_tokenizer, answer):
    tokenizer = tiny_chatglm3_tokenizer
    template = template_for(tokenizer)
    prompt = template.encode_prompt(tokenizer, [USER])
    last = template.encode_answer(tokenizer, answer)
    ids, mask = template.encode_conversation(tokenizer, [USER, answer])
    assert ids == prompt + last
    assert mask == [False] * len(prompt) + [True] * len(last)


def test_continued_turns(tiny_tokenizer, tiny_chatglm3_tokenizer):
    for tokenizer in (tiny_tokenizer, tiny_chatglm3_tokenizer):
        template = template_for(tokenizer)
        assert template.encode_continuation(tokenizer, [USER]) == template.encode_prompt(tokenizer, [USER])
    two, three = tiny_tokenizer, tiny_chatglm3_tokenizer
    assert (
        template_for(two).encode_continuation(two, [USER, ANSWER, Message("user", "q")])
        == (two.text_ids("\n\n[Round 2]\n\n问：q\n\n答：")[1:])
    )
    whole = template_for(three).encode_prompt(three, [USER, ANSWER, USER])
    before = template_for(three).encode_conversation(three, [USER, ANSWER])[0][:-1]
    assert template_for(three).encode_continuation(three, [USER, ANSWER, USER]) == whole[len(before) :]


def test_prompts_of_chatglm_without_generation_prompt():
    template = TEMPLATES["chatglm"]
    assert template.render([USER], generation_prompt=False) == "3 + 4?"
    rounds = "[Round 0]\n问：3 + 4?\n答：7\n[Round 1]\n问：3 + 4?"
    assert template.render([USER, ANSWER, USER], generation_prompt=False) == rounds
    assert template.render([USER, ANSWER, USER]) == f"{rounds}\n答："


def test_answers_of_chatglm_end_with_eop_and_no_cache_is_kept(tiny_tokenizer_folder):
    tokenizer = tokenizer_of("chatglm", tiny_tokenizer_folder)
    template = template_for(tokenizer)
    eop = tokenizer.get_command("<eop>")
    assert template.encode_answer(tokenizer, ANSWER) == [*tokenizer.text_ids("7"), eop]
    assert template.stop_ids(tokenizer) == (eop,)
    assert template.encode_continuation(tokenizer, [USER]) == template.encode_prompt(tokenizer, [USER])
    with pytest.raises(DataError, match=r"3 messages should continue from a cache.*both directions"):
        template.encode_continuation(tokenizer, [USER, ANSWER, USER])


def test_glm4_leaves_out_messages_without_content(tiny_tokenizer_folder):
    tokenizer = tokenizer_of("glm4", tiny_tokenizer_folder)
    template = template_for(tokenizer)
    empty = Message("system", "")
    assert template.encode_prompt(tokenizer, [empty, USER]) == template.encode_prompt(tokenizer, [USER])
    assert template.render([empty, USER]) == template.render([USER])
    ids, mask = template.encode_conversation(tokenizer, [empty, USER, Message("assistant", "")])
    prompt = template.encode_prompt(tokenizer, [USER])
    assert ids == [*prompt, *tokenizer.text_ids("\n"), tokenizer.end_id]
    assert mask == [False] * len(prompt) + [True] * 2
    assert template.stop_ids(tokenizer) == tuple(
        tokenizer.get_command(name) for name in ("<|endoftext|>", "<|user|>", "<|observation|>")
    )


def test_tools_of_glm4_stand_under_a_heading(tiny_tokenizer_folder):
    tokenizer = tokenizer_of("glm4", tiny_tokenizer_folder)
    tool = {"name": "clock", "description": "time", "parameters": {}}
    chat = [{"role": "system", "content": "I am GLM.", "tools": [{"type": "function", "function": tool}]}]
    chat.append({"role": "user", "content": "time?"})
    described = json.dumps(tool, indent=4, ensure_ascii=False)
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "[gMASK]<sop><|system|>\nI am GLM.\n\n# 可用工具\n\n## clock\n\n"
        + described
        + "\n在调用上述函数时，请使用 Json 格式表示调用的参数。<|user|>\ntime?<|assistant|>"
    )
    with pytest.raises(DataError, match=r"described as .'type': 'python'.*calls tools by their `name`"):
        tokenizer.apply_chat_template([{**chat[0], "tools": [{"type": "python"}]}, chat[1]], tokenize=False)


def test_tools_are_refused_where_a_release_knows_none():
    for name in ("chatglm", "chatglm2", "codegeex2"):
        with pytest.raises(
            DataError, match=f"`{name}` knows no tools, but `clock` should.*ChatGLM3 or GLM-4"
        ):
            TEMPLATES[name].announce_tools("x", [{"name": "clock"}])


REFUSED = {
    "empty": ("chatglm2", [], "0 messages"),
    "unknown role": ("chatglm3", [Message("bot", "x")], "role of message 1 is `bot`.*Valid: system, user"),
    "ends with the answer": (
        "chatglm3",
        [USER, ANSWER],
        "last message has the role `assistant`.*`user` or `observation`",
    ),
    "two questions": ("chatglm2", [USER, USER], "Message 2 has the role `user`.*`assistant` is due"),
    "answer first": ("chatglm2", [ANSWER, USER], "Message 1 has the role `assistant`.*`user` is due"),
    "late system": ("chatglm2", [USER, Message("system", "s"), USER], "Message 2 has the role `system`"),
    "tool result": ("chatglm2", [USER, RESULT], "last message has the role `observation`"),
    "tool call": ("chatglm2", [USER, CALL, USER], "Message 2 carries the metadata `clock`.*ChatGLM3"),
    "system alone": ("chatglm2", [Message("system", "s")], "last message has the role `system`"),
    "two questions to ChatGLM-6B": (
        "chatglm",
        [USER, USER],
        "Message 2 has the role `user`.*`assistant` is due",
    ),
    "earlier turns": ("codegeex2", [USER, ANSWER, USER], "takes one user message, but 3 messages"),
    "two lines of metadata": (
        "chatglm3",
        [Message("user", "x", "a\nb")],
        r"metadata of a message is 'a\\nb'.*one line",
    ),
}


@pytest.mark.parametrize(("name", "messages", "error"), REFUSED.values(), ids=list(REFUSED))
def test_refused_conversations(tiny_tokenizer_folder, name, messages, error):
    tokenizer = tokenizer_of(name, tiny_tokenizer_folder)
    with pytest.raises(DataError, match=error):
        template_for(tokenizer).encode_prompt(tokenizer, messages)


def test_refused_renderings_and_rows(tiny_tokenizer, tiny_chatglm3_tokenizer):
    with pytest.raises(DataError, match="only a system message"):
        TEMPLATES["chatglm2"].render([Message("system", "s")])
    with pytest.raises(
        DataError, match=r"template of `chatglm2`.*one answer.*all 2 messages.*one row per assistant turn"
    ):
        template_for(tiny_tokenizer).encode_conversation(tiny_tokenizer, [USER, ANSWER])
    with pytest.raises(DataError, match="last message has the role `user`, but here it must be `assistant`"):
        template_for(tiny_chatglm3_tokenizer).encode_conversation(tiny_chatglm3_tokenizer, [USER])
