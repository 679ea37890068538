"""Prompts and the plain path for the tests of the engine: one prompt at a time, the model called directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "models"
FAMILIES = {
    "chatglm": "chatglm",
    "chatglm-1d": "chatglm",
    "chatglm-march": "chatglm",
    "chatglm2": "chatglm2",
    "chatglm2-32k": "chatglm2-32k",
    "chatglm3": "chatglm3",
    "glm4": "glm4",
    "per-head": "chatglm2",
}
ORACLES = [
    "v1/checkpoint_safetensors", "v1_1d/checkpoint_safetensors", "v1_l28/checkpoint_safetensors",
    "v2/checkpoint_safetensors", "v2_32k/checkpoint_safetensors", "glm3/checkpoint_safetensors",
    "glm3_32k/checkpoint_safetensors", "glm4/checkpoint_safetensors",
]  # fmt: skip
WORDS = range(5, 40)
"""Ids that are no special token in any of the checkpoints."""


def shared_prompts(config: Any) -> list[list[int]]:
    """Two groups of prompts that begin alike, a nested one, twins, and loners, of several lengths."""
    source = torch.Generator().manual_seed(3)

    def words(count: int) -> list[int]:
        return torch.randint(WORDS.start, WORDS.stop, (count,), generator=source).tolist()

    first, second = words(17), words(11)
    nested = first + words(9)
    prompts = [first + words(count) for count in (1, 6, 3, 10)]
    prompts += [second + words(count) for count in (4, 2, 7)]
    prompts += [nested + words(count) for count in (2, 5, 1)]
    prompts += [prompts[1], words(1), words(13)]
    if getattr(config, "gmask_token_id", None) is not None:  # ChatGLM-6B
        return [[*prompt, config.gmask_token_id, config.bos_token_id] for prompt in prompts]
    return prompts


@torch.no_grad()
def plain_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    """Logits ``[vocab]`` after one prompt read alone."""
    return model(torch.tensor([prompt])).logits[0, -1]


@torch.no_grad()
def plain_generate(model: Any, prompt: list[int], stop_ids: tuple[int, ...], count: int) -> list[int]:
    """Greedy tokens, the whole text read again for each of them; the end token included."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]
