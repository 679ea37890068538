"""Greedy answers alone and in a mixed batch: how many are the same, and how close the choice was where not.

In another batch sums of products are rounded otherwise, so that of two tokens that are almost equally likely
the other one may be chosen (`serving.py ties`). The margin is the difference of the two largest logits in the
answer that ran alone, at the first token that differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from glmtune.inference.engine.engine import Engine
from glmtune.inference.requests.chat import ChatEngine
from glmtune.inference.requests.generation import Generated, Generation
from glmtune.inference.requests.request import Request
from glmtune.inference.requests.sampling import Sampling
from glmtune.inference.settings import EngineSettings
from glmtune.loading import load_model, load_tokenizer
from glmtune.models.templates.base import TextTokenizer

NUM_REQUESTS = 64
NUM_TOKENS = 64
ARMS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int4": {"dtype": "float32", "quantization": "int4"},
}
DATA = Path(__file__).resolve().parent.parent / "data"
FILES = ("chat/dev.jsonl", "ads/dev.jsonl")
COLUMNS = (("prompt", "history"), ("content", ""))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Compare in every type; the model and the length are `serving.py`'s options."""
    return {name: compare(options.model, **arm) for name, arm in ARMS.items()}


def compare(source: str, **arm: Any) -> dict[str, Any]:
    """Answer every prompt alone, then all together, joining step by step."""
    model = load_model(source, device="cpu", **arm)
    chat = ChatEngine(Engine(model, EngineSettings(reuse_caches=False)), load_tokenizer(source))
    stop_ids = frozenset(chat.template.stop_ids(cast("TextTokenizer", chat.tokenizer)))
    # As long as the others: answers that end early would leave a batch of few rows.
    sampling = Sampling(max_new_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)
    prompts = [chat.prompt_ids(messages) for messages in conversations()]
    requests = [Request(prompt_ids=prompt, sampling=sampling, stop_ids=stop_ids) for prompt in prompts]
    alone = [answer for request in requests for answer in answers(chat.engine, [request])]
    together = answers(Engine(model, EngineSettings(batch_size=NUM_REQUESTS)), requests)
    return report(alone, together, stop_ids)


def conversations() -> list[list[dict[str, str]]]:
    """Return real prompts: chats with what was said before, and tasks without."""
    found: list[list[dict[str, str]]] = []
    for name in FILES:
        lines = (DATA / name).read_text(encoding="utf-8").splitlines()
        for line in lines[: NUM_REQUESTS // len(FILES)]:
            row = json.loads(line)
            question, history = next(names for names in COLUMNS if names[0] in row)
            rounds = [("user", "assistant")[place] for _ in row.get(history, ()) for place in (0, 1)]
            texts = [text for pair in row.get(history, ()) for text in pair]
            messages = [{"role": role, "content": text} for role, text in zip(rounds, texts, strict=True)]
            found.append([*messages, {"role": "user", "content": row[question]}])
    return found


def answers(engine: Any, requests: Sequence[Request]) -> list[Generated]:
    """Let requests join a step after each other, and run to their end."""
    generations: list[Generation] = []
    for request in requests:
        generations.append(engine.submit(request))
        engine.step()
    while engine.step():
        pass
    return [generation.result() for generation in generations]


def report(
    alone: Sequence[Generated], together: Sequence[Generated], stop_ids: frozenset[int]
) -> dict[str, Any]:
    """Count what is the same, and say how close the choice was where answers part."""
    margins = [[margin(entry.top) for entry in answer.logprobs] for answer in alone]
    partings: list[dict[str, Any]] = []
    for place, (first, second) in enumerate(zip(alone, together, strict=True)):
        pairs = enumerate(zip(first.token_ids, second.token_ids, strict=True))
        at = next((token for token, (one, other) in pairs if one != other), None)
        if at is not None:
            is_behind = any(token in stop_ids for token in first.token_ids[:at])
            partings.append(
                {"request": place, "token": at, "margin": margins[place][at], "is_behind_end": is_behind}
            )
    all_margins = [each for row in margins for each in row]
    closest = max((parting["margin"] for parting in partings), default=0.0)
    return {
        "same_frac": 1 - len(partings) / len(alone),
        "num_parted": len(partings),
        "num_parted_before_end": sum(not parting["is_behind_end"] for parting in partings),
        "largest_margin_where_parted": closest,
        "tokens_at_most_as_close_frac": statistics.mean(each <= closest for each in all_margins),
        "smallest_margin": min(all_margins),
        "median_margin": statistics.median(all_margins),
        "partings": partings,
    }


def margin(top: Sequence[tuple[int, float]]) -> float:
    """Return how much larger the largest logit is than the next."""
    return top[0][1] - top[1][1]
