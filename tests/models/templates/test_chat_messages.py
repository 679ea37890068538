"""`apply_chat_template`: chat messages of other libraries through our renderer."""

from __future__ import annotations

import json

import pytest
import torch

from glmtune.errors import ConfigError, DataError
from glmtune.messages import Message
from glmtune.models.templates.renderer import template_for

CHAT = [{"role": "user", "content": "3 + 4?"}]
ANSWERED = [*CHAT, {"role": "assistant", "content": "7"}]
LONGER = [*ANSWERED, {"role": "user", "content": "How many apples are left?"}]
WEATHER = {
    "name": "weather",
    "description": "Tell the weather",
    "parameters": {"type": "object", "properties": {}},
}


@pytest.fixture(params=["chatglm2", "chatglm3"])
def tokenizer(request, tiny_tokenizer, tiny_chatglm3_tokenizer):
    return tiny_tokenizer if request.param == "chatglm2" else tiny_chatglm3_tokenizer


def test_prompt(tokenizer):
    expected = template_for(tokenizer).encode_prompt(tokenizer, [Message("user", "3 + 4?")])
    out = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    assert out["input_ids"] == expected
    assert out["attention_mask"] == [1] * len(expected)
    assert tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False) == expected
    tensors = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt")
    assert tensors["input_ids"].tolist() == [expected]
    assert (
        tokenizer.apply_chat_template(
            [Message("user", "3 + 4?")], add_generation_prompt=True, return_dict=False
        )
        == expected
    )


def test_generation_prompt_only_where_asked_for(tokenizer):
    short, whole = (
        tokenizer.apply_chat_template(CHAT, add_generation_prompt=flag, return_dict=False)
        for flag in (False, True)
    )
    assert len(short) < len(whole)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True).startswith(text)


def test_answered_conversation_continues_the_prompt_and_ends(tokenizer):
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(ANSWERED, return_assistant_tokens_mask=True)
    ids = whole["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert ids[-1] == tokenizer.end_id
    assert whole["assistant_masks"] == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    still_open = tokenizer.apply_chat_template(ANSWERED, continue_final_message=True, return_dict=False)
    assert still_open == ids[:-1]


def test_batches(tokenizer):
    chats = [CHAT, LONGER]
    rows = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    assert rows == [
        tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats
    ]
    padded = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt"
    )
    assert padded["input_ids"][0].tolist() == [0] * (len(rows[1]) - len(rows[0])) + rows[0]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    assert texts[1] == tokenizer.apply_chat_template(LONGER, add_generation_prompt=True, tokenize=False)
    cut = tokenizer.apply_chat_template(chats, add_generation_prompt=True, truncation=True, max_length=6)
    assert cut["input_ids"] == [row[:6] for row in rows]


def test_masks_follow_padding_and_truncation(tokenizer):
    chats = [ANSWERED, [CHAT[0], {"role": "assistant", "content": "The answer is 7, many apples are left."}]]
    plain = [tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True) for chat in chats]
    out = tokenizer.apply_chat_template(
        chats, padding=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    assert isinstance(out["assistant_masks"], torch.Tensor)
    padding = out["input_ids"].shape[1] - len(plain[0]["input_ids"])
    assert out["assistant_masks"][0].tolist() == [0] * padding + plain[0]["assistant_masks"]
    length = len(plain[1]["input_ids"]) - 3
    cut = tokenizer.apply_chat_template(
        chats[1], truncation=True, max_length=length, return_assistant_tokens_mask=True
    )
    assert cut["assistant_masks"] == plain[1]["assistant_masks"][:length]


def test_chatglm3_masks_every_answer_and_chatglm2_refuses(tiny_tokenizer, tiny_chatglm3_tokenizer):
    chat = [*LONGER, {"role": "assistant", "content": "5"}]
    out = tiny_chatglm3_tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)
    messages = [Message(item["role"], item["content"]) for item in chat]
    ids, mask = template_for("chatglm3").encode_conversation(tiny_chatglm3_tokenizer, messages)
    assert out["input_ids"] == ids
    assert out["assistant_masks"] == [int(flag) for flag in mask]
    with pytest.raises(DataError, match="one row per assistant turn"):
        tiny_tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)
    assert tiny_tokenizer.apply_chat_template(chat, return_dict=False)[-1] == tiny_tokenizer.end_id


def test_tools_stand_in_the_system_message(tiny_tokenizer, tiny_chatglm3_tokenizer):
    def clock(city: str) -> str:
        """Tell the time.

        Args:
            city: where.
        """
        return city

    written = json.dumps([WEATHER], indent=4, ensure_ascii=False)
    render = tiny_chatglm3_tokenizer.apply_chat_template
    with pytest.raises(DataError, match=r"tools but no system message.*Put a system message first"):
        render(CHAT, tools=[WEATHER], tokenize=False)
    system = {"role": "system", "content": "Use tools."}
    wrapped = {"type": "function", "function": WEATHER}
    expected = f"<|system|>\nUse tools.\n{written}<|user|>\n3 + 4?"
    assert render([system, *CHAT], tools=[wrapped], tokenize=False) == expected
    assert render([{**system, "tools": [WEATHER]}, *CHAT], tokenize=False) == expected
    assert '"name": "clock"' in render([system, *CHAT], tools=[clock], tokenize=False)
    result = render([*CHAT, {"role": "tool", "content": "noon"}], add_generation_prompt=True, tokenize=False)
    assert result == "<|user|>\n3 + 4?<|observation|>\nnoon<|assistant|>"
    in_system = [{**system, "tools": [WEATHER]}, *CHAT]
    with pytest.raises(DataError, match=r"Message 1 .* template `chatglm2` knows no tools"):
        tiny_tokenizer.apply_chat_template(in_system, tokenize=False)
    with pytest.raises(DataError, match=r"template `chatglm2` knows no tools.*`weather`.*ChatGLM3"):
        tiny_tokenizer.apply_chat_template(CHAT, tools=[WEATHER], tokenize=False)


REFUSED = {
    "nothing": ([], {}, "0 messages"),
    "text": (["hi"], {}, "Message 1 is a str"),
    "unknown key": (
        [{"role": "assistant", "content": "", "reasoning": "hm"}],
        {},
        "key `reasoning`.*metadata",
    ),
    "content in parts": (
        [{"role": "user", "content": [{"type": "text"}]}],
        {},
        "`content` is .*must be text",
    ),
    "no role": ([{"content": "hi"}], {}, "`role` is None"),
    "unknown role": (
        [{"role": "users", "content": "hi"}],
        {},
        "role of message 1 is `users`.*Did you mean `user`",
    ),
    "tools elsewhere": (
        [{"role": "user", "content": "x", "tools": [WEATHER]}],
        {},
        "role `user` and carries `tools`",
    ),
    "prompt behind an answer": (
        ANSWERED,
        {"add_generation_prompt": True},
        "last message has the role `assistant`",
    ),
    "no answer to continue": (
        CHAT,
        {"continue_final_message": True},
        "`continue_final_message` needs.*`user`",
    ),
    "no answer to mask": (
        CHAT,
        {"return_assistant_tokens_mask": True},
        "`return_assistant_tokens_mask` needs",
    ),
}


@pytest.mark.parametrize(("chat", "settings", "error"), REFUSED.values(), ids=list(REFUSED))
def test_refused(tiny_chatglm3_tokenizer, chat, settings, error):
    with pytest.raises(DataError, match=error):
        tiny_chatglm3_tokenizer.apply_chat_template(chat, **settings)


@pytest.mark.parametrize("tokenize", [True, False])
def test_settings_our_renderer_cannot_obey_are_refused(tokenizer, tokenize):
    settings = {"chat_template": "{{ messages }}", "documents": [{"text": "x"}], "enable_thinking": True}
    for name, value in settings.items():
        with pytest.raises(ConfigError, match=f"{name}=.*own renderer"):
            tokenizer.apply_chat_template(CHAT, tokenize=tokenize, **{name: value})
    assert tokenizer.apply_chat_template(
        CHAT, tokenize=tokenize, chat_template=None, sanitize_control_tokens=True
    )
