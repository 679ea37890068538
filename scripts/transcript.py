"""Write the transcript in ``docs``: what a tuned customer-service prefix and its base answer, side by side.

``python scripts/transcript.py RUN docs/transcripts/customer_service.md``, with RUN a run of
``+recipe=ptuning_chat`` on ``data/chat`` over glm-tiny. With ``--save FOLDER`` the prefix goes there as well,
its projection computed, so that it is small enough to be kept: that of the tests was made so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glmtune.loading import load_model, load_tokenizer
from glmtune.messages import Message
from glmtune.models.templates.renderer import template_for
from glmtune.prefix.checkpoint import describe_prefix, find_prefix, load_prefix, save_prefix
from glmtune.prefix.encoder import PrefixEncoder
from glmtune.switch.model import decide_prompts, switch_of
from glmtune.tiny.corpus.chat_style import GREETING, LOOK

Pair = tuple[str, str]
GENERAL = {
    "Sums": ("12+30", "7*8等于多少？", "25-1等于多少？", "What is 9+6?"),
    "Facts": (
        "法国的首都是哪里？",
        "What is the capital of France?",
        "水的化学式是什么？",
        "冷的反义词是什么？",
    ),
    "Who are you": ("你是谁？", "你叫什么名字？", "Who are you?", "What is your name?"),
}
"""Questions that stand alone."""
SHOP = {
    "在吗？": GREETING,
    "有人吗？": GREETING,
    "我想买一件长裙。": LOOK.format(goods="长裙"),
    "有没有西装？": LOOK.format(goods="西装"),
}
"""First questions of customers, and what the shop's assistant says to them."""
TALK = (("在吗？", GREETING), ("我想买一件长裙。", LOOK.format(goods="长裙")))
ASIDE = "12+30等于多少？"
"""Asked in the middle of a sale, behind `TALK`."""
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Turn:
    """A question and what became of it.

    Attributes:
        part: heading in the transcript.
        question: as it was asked.
        base: the base's answer.
        tuned: that of the base with the prefix and its switch.
        is_tuned: whether the prefix applied.
    """

    part: str
    question: str
    base: str
    tuned: str
    is_tuned: bool


def ask(prefix: str | Path, *, use_switch: bool = True) -> list[Turn]:
    """Ask base and tuned model, greedily.

    Args:
        prefix: a run, or a folder with a prefix for glm-tiny.
        use_switch: obey the prefix' switch; False: the prefix applies to every question.
    """
    tokenizer = load_tokenizer("glm-tiny")
    base = load_model("glm-tiny", device="cpu", dtype="float32")
    tuned = load_model("glm-tiny", device="cpu", dtype="float32", prefix=str(prefix), use_switch=use_switch)

    def turn(part: str, question: str, history: Sequence[Pair] = ()) -> Turn:
        before, after = (_answer(model, tokenizer, question, history) for model in (base, tuned))
        return Turn(part, question, before, after, _is_tuned(tuned, tokenizer, question, history))

    turns = [turn(part, question) for part, questions in GENERAL.items() for question in questions]
    turns += [turn("The shop", question) for question in SHOP]
    return [*turns, turn("A sum in the middle of a sale", ASIDE, TALK)]


def _answer(model: Any, tokenizer: Any, question: str, history: Sequence[Pair]) -> str:
    answer, _ = model.chat(
        tokenizer, question, history=list(history), do_sample=False, max_new_tokens=MAX_NEW_TOKENS
    )
    return answer


def _is_tuned(model: Any, tokenizer: Any, question: str, history: Sequence[Pair]) -> bool:
    if (switch := switch_of(model)) is None:
        return True
    said = [
        message
        for asked, answer in history
        for message in (Message("user", asked), Message("assistant", answer))
    ]
    ids = template_for(tokenizer).encode_prompt(tokenizer, [*said, Message("user", question)])
    return bool(decide_prompts(model, switch, [torch.tensor(ids)])[0])


def render(turns: Sequence[Turn]) -> str:
    """Write turns as a Markdown page."""
    lines = [
        "# A shop assistant that still answers sums",
        "",
        "glm-tiny, tuned on `data/chat` by `+recipe=ptuning_chat data.loss_on=all_turns`, asked beside its",
        "base; greedy answers. Written by `scripts/transcript.py`; `tests/e2e/test_customer_service.py` asks",
        "again and compares.",
    ]
    for part in dict.fromkeys(turn.part for turn in turns):
        lines += ["", f"## {part}", "", "| question | base | tuned | answered by |", "|---|---|---|---|"]
        lines += [
            f"| {_cell(turn.question)} | {_cell(turn.base)} | {_cell(turn.tuned)} "
            f"| {'the prefix' if turn.is_tuned else 'the base'} |"
            for turn in turns
            if turn.part == part
        ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("*", "\\*").split())


def save_computed(prefix: str | Path, folder: Path) -> Path:
    """Save a prefix with its projection computed: the same keys and values, a tenth of the numbers.

    Args:
        prefix: a run, or a folder with a prefix for glm-tiny.
        folder: where to.
    """
    file = find_prefix(prefix)
    encoder = load_prefix(file, load_model("glm-tiny", device="cpu", dtype="float32"))
    plain = PrefixEncoder(encoder.shape, pre_seq_len=encoder.pre_seq_len)
    plain.load_state_dict({"embedding.weight": encoder.rows().detach()})
    return save_prefix(plain, folder, meta=describe_prefix(file).meta, switch=encoder.switch)


def main() -> None:
    """Ask, write the page, and save the prefix where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("prefix", help="a run folder")
    parser.add_argument("page", type=Path, help="the Markdown file")
    parser.add_argument("--save", type=Path, help="folder for the prefix with its projection computed")
    arguments = parser.parse_args()
    prefix = arguments.prefix
    if arguments.save is not None:
        prefix = save_computed(prefix, arguments.save).parent
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(render(ask(prefix)), encoding="utf-8")


if __name__ == "__main__":
    main()
