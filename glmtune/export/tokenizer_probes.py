"""What a tokenizer that transformers alone reads is compared in with ours before an export appears.

Texts, control words in them, tokens that a user added, whole conversations with tools, empty messages and
line breaks at the edges, decoding, and where answers end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerFast

from glmtune.errors import CheckpointError
from glmtune.models.releases.families import Family
from glmtune.models.templates.renderer import template_for
from glmtune.models.tokenizers.tokenizer_json import JsonTokenizer
from glmtune.models.tokenizers.vocabulary import VocabularyTokenizer

PROBE_TEXTS = (
    "你好，今天想去哪里？",
    "  Two blanks,\ttabs\n\nand line  breaks; naïve café №7 😀",
    "def f(x):\n    return x ** 2  # 12345",
    "\n\n- one\n- two \n",
)
"""Where translations go wrong: Chinese punctuation, leading and repeated blanks, line breaks, bytes of no
piece, digits."""
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Says "rain" or 晴',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": '北京 "a\'b"', "days": 2}}}

Chat = list[dict[str, Any]]


def compare_tokenizers(ours: VocabularyTokenizer, fast: PreTrainedTokenizerFast, folder: Path) -> None:
    """Compare a tokenizer with what transformers reads of its translation.

    Args:
        ours: the source.
        fast: read from ``folder``.
        folder: where the translation lies; if there is a generation_config.json, it has to name all ids that
            end an answer.

    Raises:
        CheckpointError: ids, texts or ends differ; the first difference is shown.
    """
    for what, expected, found in _pairs(ours, fast):
        if found != expected:
            raise CheckpointError(
                f"The tokenizer as transformers reads it gives {str(found)[:400]} for {what[:200]!r}, but "
                f"the source's gives {str(expected)[:400]}. The tokenizer's files have rules of their own "
                "that tokenizer.json cannot hold; use `format=official`."
            )
    if (folder / "generation_config.json").is_file():
        _compare_stops(ours, folder)


def _pairs(ours: VocabularyTokenizer, fast: PreTrainedTokenizerFast) -> Iterator[tuple[str, Any, Any]]:
    """Yield what is compared: in words, what ours makes of it, and what transformers makes of it."""
    tokens: Any = fast
    front, behind = ours.prefix_ids, ours.suffix_ids
    for text in (*PROBE_TEXTS, *_added_texts(ours)):
        ids = ours.text_ids(text)
        yield text, [*front, *ids, *behind], tokens(text)["input_ids"]
        # The released code of GLM-4 puts blanks around special tokens, as no decoder of tokenizer.json does.
        yield f"decoded {text}", ours.decode(ids, spaces_between_special_tokens=False), tokens.decode(ids)
    words = control_words(ours)
    plain = [*front, *ours.text_ids(words), *behind]
    yield f"{words} (split_special_tokens)", plain, tokens(words, split_special_tokens=True)["input_ids"]
    yield "the length", len(ours), len(fast)
    yield "the end token", (ours.end_id, ours.pad_token_id), (fast.eos_token_id, fast.pad_token_id)
    if isinstance(ours, JsonTokenizer):
        return  # the template is the folder's own
    for chat, tools in _chats(ours):
        settings: dict[str, Any] = {"tools": tools, "add_generation_prompt": True}
        expected: Any = ours.apply_chat_template(cast(Any, chat), **settings, return_dict=False)
        yield f"{chat}, tools {tools}", expected, _prompted(tokens, chat, settings)


def _prompted(fast: Any, chat: Chat, settings: dict[str, Any]) -> Any:
    try:
        return fast.apply_chat_template(chat, **settings)["input_ids"]
    except TemplateError as error:
        return f"a refusal ({error})"


def control_words(ours: VocabularyTokenizer) -> str:
    """Return a text with the names of all tokens that no text may bring."""
    names = [*ours.command_names, "<s>", "</s>", "<unk>", "<sop>", "<eop>", "<|endoftext|>"]
    return "a " + " b".join(dict.fromkeys(names)) + "c"


def _added_texts(ours: VocabularyTokenizer) -> list[str]:
    added = [*ours.get_added_vocab(), *(ours.user_names if isinstance(ours, JsonTokenizer) else ())]
    return [] if not added else [f"x{added[0]} y{added[-1]}{added[0]}", *(f"{name}z" for name in added)]


def _chats(ours: VocabularyTokenizer) -> Iterator[tuple[Chat, list[Any] | None]]:
    """Yield conversations that the release's template knows, each with the tools announced beside it."""
    if ours.family is Family.CODEGEEX2:
        return
    words = control_words(ours)
    edges = ["", " ", "\n", "\n \nx", *PROBE_TEXTS, words, f"\n{words}", *_added_texts(ours)]
    for text in edges:
        turns = [("user", text), ("assistant", text), ("user", f"{text}?"), ("assistant", ""), ("user", text)]
        yield _messages(turns), None
        yield _messages([("system", text), *turns[:3]]), None
    if not template_for(ours).knows_tools:
        return
    system, asked = {"role": "system", "content": f"Help. {words}"}, {"role": "user", "content": "雨?"}
    calling = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]}
    odd = {"name": "weather", "arguments": {"not a name": None, "deep": {"x": [1.5, True]}}}
    called = {"role": "assistant", "metadata": "weather", "content": "{}"}
    result = {"role": "tool", "content": '{"rain": "</s>"}'}
    yield [system, asked], [TOOL, TOOL["function"]]
    yield [{"role": "system", "content": ""}, asked], [TOOL]
    yield [system | {"tools": [TOOL]}, asked, calling, result], None
    yield [system, asked, {"role": "assistant", "function_call": odd}, result], [TOOL]
    yield [asked, called, {"role": "observation", "content": words}], None


def _messages(turns: Sequence[tuple[str, str]]) -> Chat:
    return [{"role": role, "content": text} for role, text in turns]


def _compare_stops(ours: VocabularyTokenizer, folder: Path) -> None:
    stored = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    found = {stored} if isinstance(stored, int) else set(stored or ())
    absent = set(template_for(ours).stop_ids(ours)) - found
    if absent:
        raise CheckpointError(
            f"generation_config.json of the export names {sorted(found)} as ends of an answer, but the "
            f"release's answers also end with {sorted(absent)}. Please report this."
        )
