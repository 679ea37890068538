"""Perplexity of two models on one text, window by window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.compare.settings import GateSettings
from evaluation.sample import WindowLoss
from glmtune.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class TextLoss:
    """Perplexity of both models on a text file.

    Attributes:
        path: the file.
        num_tokens: tokens predicted.
        baseline: perplexity, exp of the mean negative log-likelihood per token.
        candidate: the same.
        change_nats: mean negative log-likelihood per token, candidate minus baseline.
        low_nats: lower end of its bootstrap interval, over windows of text.
        high_nats: upper end; both are None where the text is a single window.
    """

    path: str
    num_tokens: int
    baseline: float
    candidate: float
    change_nats: float
    low_nats: float | None
    high_nats: float | None


def read_text(path: str) -> str:
    """Read the text file of a comparison.

    Args:
        path: UTF-8.

    Raises:
        ConfigError: there is no such file.
        DataError: it is empty or no UTF-8.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"`text_file` is `{path}`, but it cannot be read ({error.strerror or error}). Name a text in"
            " UTF-8."
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"it must be UTF-8, but byte {error.start} is not. Convert it.", path=path) from None
    if not text.strip():
        raise DataError("it is empty, but a perplexity needs text. Give one with some sentences.", path=path)
    return text


def compare_losses(
    path: str, baseline: Sequence[WindowLoss], candidate: Sequence[WindowLoss], gate: GateSettings
) -> TextLoss:
    """Compare two models on the same windows.

    Args:
        path: of the text.
        baseline: losses of one model.
        candidate: losses of the other on the same windows.
        gate: confidence and draws.

    Raises:
        DataError: the models cut the text into other tokens.
    """
    import numpy as np

    sizes = np.array([window.num_tokens for window in baseline], dtype=float)
    if [window.num_tokens for window in candidate] != [window.num_tokens for window in baseline]:
        counts = [sum(window.num_tokens for window in windows) for windows in (baseline, candidate)]
        raise DataError(
            f"the two models cut it into {counts[0]} and {counts[1]} tokens, so their perplexities mean"
            " different things. Leave `text_file` out where tokenizers differ.",
            path=path,
        )
    before = np.array([window.nats for window in baseline])
    change = np.array([window.nats for window in candidate]) - before
    low, high = None, None
    if len(sizes) > 1:
        # Windows are drawn, not tokens: the losses of neighbouring tokens depend on each other.
        generator = np.random.default_rng(gate.seed)
        shares = np.full(len(sizes), 1 / len(sizes))
        drawn = generator.multinomial(len(sizes), shares, gate.num_resamples)
        ends = [50 * (1 - gate.confidence), 50 * (1 + gate.confidence)]
        low, high = map(float, np.percentile(drawn @ change / (drawn @ sizes), ends))
    total = float(sizes.sum())
    return TextLoss(
        path=path,
        num_tokens=int(total),
        baseline=math.exp(before.sum() / total),
        candidate=math.exp((before.sum() + change.sum()) / total),
        change_nats=float(change.sum() / total),
        low_nats=low,
        high_nats=high,
    )
