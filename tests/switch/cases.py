"""Rules for tests: one that lets about half of some prompts through, and what makes a file of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from glmtune.prefix.checkpoint import load_prefix, save_prefix
from glmtune.switch.files import save_switch
from glmtune.switch.rule import Switch, SwitchFacts
from tests.inference.engine.requests import write_lora, write_prefix

FACTS = SwitchFacts("logistic", 0.995, 0.0, 0.01, 40, 60)


@torch.no_grad()
def last_hidden(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Hidden states ``[N, D]`` of the model as it is, each prompt alone."""
    stack = model.base_model
    return torch.stack([stack(torch.tensor([list(p)])).last_hidden_state[0, -1] for p in prompts])


def dividing_switch(model: Any, prompts: Sequence[Sequence[int]], *, seed: int = 5) -> Switch:
    """Return a rule that about half of the prompts pass, none of them narrowly.

    Args:
        model: the bare base.
        prompts: token ids.
        seed: of the rule.
    """
    hidden_ND = last_hidden(model, prompts)
    weight = torch.randn(hidden_ND.shape[1], generator=torch.Generator().manual_seed(seed))
    scores = (hidden_ND @ weight).sort().values.unique()
    middle = len(scores) // 2
    gaps = scores[middle - 2 : middle + 3].diff()
    widest = middle - 2 + int(gaps.argmax())  # rounding in another batch must not turn a decision
    return Switch(weight, -float(scores[widest] + scores[widest + 1]) / 2, FACTS)


def write_tuned(model: Any, folder: Path, kind: str, switch: Switch | None, *, seed: int = 3) -> Path:
    """Save a random prefix or LoRA, with a switch if one is given."""
    if kind == "lora":
        write_lora(model, folder, seed=seed)
        if switch is not None:
            save_switch(switch, folder)
        return folder
    file = write_prefix(model, folder, seed=seed, length=4)
    if switch is not None:
        save_prefix(load_prefix(file, model), folder, switch=switch)
    return folder
