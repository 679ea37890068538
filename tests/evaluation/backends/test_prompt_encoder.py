"""A model that was tuned with a system message is asked with it."""

from __future__ import annotations

from evaluation.backends.prompt_encoder import PromptEncoder
from evaluation.sample import Prompt
from glmtune.messages import Message


def test_system_message_goes_before_conversations_without_one(tiny_chatglm3_tokenizer) -> None:
    question, own = Message("user", "颜色？"), Message("system", "慢慢想。")
    plain = PromptEncoder(tiny_chatglm3_tokenizer)
    tuned = PromptEncoder(tiny_chatglm3_tokenizer, system="be kind")
    asked, with_own = Prompt(turns=(question,)), Prompt(turns=(own, question))
    assert (
        tuned.ids(asked)
        == plain.ids(Prompt(turns=(Message("system", "be kind"), question)))
        != plain.ids(asked)
    )
    assert tuned.ids(with_own) == plain.ids(with_own)
    assert tuned.ids(Prompt(text="1+1=")) == plain.ids(Prompt(text="1+1="))
