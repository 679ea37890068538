"""The rule itself: one vector and one number over the base's last hidden state at a prompt's last token.

It is saved beside what was tuned: in the prefix' own file, or in ``switch.safetensors`` beside an adapter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from glmtune.errors import CheckpointError, ShapeError
from glmtune.storage.json_files import shown

WEIGHT_NAME, BIAS_NAME = "switch.weight", "switch.bias"
"""Names of the tensors in a file."""
TENSORS = frozenset({WEIGHT_NAME, BIAS_NAME})
METADATA_KEY = "switch"
"""Of a file's metadata: holds the facts, as JSON."""


@dataclass(frozen=True, slots=True)
class SwitchFacts:
    """How a rule was made, and how well it does on prompts that it was not fitted to.

    Attributes:
        kind: ``logistic`` (task prompts against general ones) or ``one_class`` (task prompts alone).
        auroc: how well scores order held-out prompts, 1 = every task prompt above every general one; None
            where there were no general prompts.
        task_off: share of held-out task prompts that it leaves to the base, 0 to 1.
        general_on: share of held-out general prompts to which the tuned part applies; None without any.
        num_task: task prompts held out.
        num_general: general prompts held out.
    """

    kind: str
    auroc: float | None
    task_off: float
    general_on: float | None
    num_task: int
    num_general: int

    def line(self) -> str:
        """Word the figures.

        >>> SwitchFacts("logistic", 1.0, 0.005, 0.0, 200, 300).line()
        'AUROC 1.000, task prompts off 0.5 %, general prompts on 0.0 % (held out, n=200+300)'
        """
        off = f"task prompts off {100 * self.task_off:.1f} %"
        if self.auroc is None or self.general_on is None:
            return f"{off} (held out, n={self.num_task}; fitted without general prompts)"
        on = f"general prompts on {100 * self.general_on:.1f} %"
        return f"AUROC {self.auroc:.3f}, {off}, {on} (held out, n={self.num_task}+{self.num_general})"


@dataclass(frozen=True, eq=False)
class Switch:
    """Decides by ``weight · hidden + bias > 0`` whether the tuned part applies.

    Attributes:
        weight: float32 ``[hidden]``, on the CPU.
        bias: finite.
        facts: how it was made.
    """

    weight: Tensor
    bias: float
    facts: SwitchFacts

    def scores(self, hidden_BD: Tensor) -> Tensor:
        """Score prompts; above 0 the tuned part applies.

        Args:
            hidden_BD: hidden states of the bare base after its final norm at the last tokens of prompts,
                any float type.

        Returns:
            float32 ``[B]``, on the device of the hidden states.
        """
        # Not by a matrix product: its order of summation, and with it the last digits, depends on B.
        products_BD = hidden_BD.float() * self.weight.to(hidden_BD.device)
        return products_BD.sum(dim=-1) + self.bias

    def decide(self, hidden_BD: Tensor) -> Tensor:
        """Return for which prompts the tuned part applies, bool ``[B]``; see `scores`.

        Hidden states that are not finite give False: then the base answers.
        """
        return self.scores(hidden_BD) > 0

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that stand for the rule (not for its facts)."""
        digest = hashlib.sha256(self.weight.contiguous().numpy().tobytes())
        digest.update(repr(self.bias).encode())
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file holds of it, by name."""
        return {WEIGHT_NAME: self.weight, BIAS_NAME: torch.tensor([self.bias], dtype=torch.float32)}

    def described(self) -> str:
        """Return its facts as JSON, for a file's metadata."""
        return json.dumps(dataclasses.asdict(self.facts))

    @classmethod
    def from_file(cls, file: Path, tensors: Mapping[str, Tensor], facts: object) -> Self:
        """Make a rule of what a file holds.

        Args:
            file: for messages.
            tensors: at least those of `tensors`.
            facts: what the metadata say, parsed.

        Raises:
            CheckpointError: it is no rule, with what is wrong.
        """
        problem = None
        missing = TENSORS - set(tensors)
        if missing:
            problem = f"{', '.join(sorted(missing))} is missing"
        else:
            weight, bias = tensors[WEIGHT_NAME], tensors[BIAS_NAME]
            if weight.dim() != 1 or not len(weight) or tuple(bias.shape) != (1,):
                problem = f"its tensors are {list(weight.shape)} and {list(bias.shape)}, not [hidden] and [1]"
            elif not (weight.is_floating_point() and bias.is_floating_point()):
                problem = f"its tensors are {weight.dtype} and {bias.dtype}, not of a floating type"
            elif not (weight.isfinite().all() and bias.isfinite().all()):
                problem = "its numbers are not finite"
        found = _facts(facts)
        if problem is None and found is None:
            problem = f"its metadata say `{METADATA_KEY}` = {shown(facts)}, which are not the facts of one"
        if problem is not None or found is None:
            raise CheckpointError(
                f"The switch in `{file}` cannot be used: {problem}. The file was edited or is damaged: fetch "
                "it again, or take another checkpoint of the run."
            )
        return cls(tensors[WEIGHT_NAME].float().cpu(), float(tensors[BIAS_NAME].float()), found)

    def check_width(self, hidden_size: int, what: str) -> None:
        """Refuse a model whose hidden states are of another width.

        Raises:
            ShapeError: with both widths.
        """
        if len(self.weight) != hidden_size:
            raise ShapeError(
                f"The switch of {what} was made for hidden states of width {len(self.weight)}, but the model "
                f"has {hidden_size}. Load it with the base it was trained on."
            )


def _facts(found: object) -> SwitchFacts | None:
    """Return the facts that a file names; None where they are none."""
    names = {field.name for field in dataclasses.fields(SwitchFacts)}
    if not isinstance(found, dict) or set(found) != names or not isinstance(found["kind"], str):
        return None
    values: dict[str, Any] = dict(found)
    shares = [values["task_off"], *(values[n] for n in ("auroc", "general_on") if values[n] is not None)]
    counts = [values["num_task"], values["num_general"]]
    is_share = all(type(each) in (int, float) and 0 <= each <= 1 for each in shares)
    return SwitchFacts(**values) if is_share and all(type(each) is int for each in counts) else None
