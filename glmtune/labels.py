"""The label that carries no loss."""

from __future__ import annotations

IGNORE_INDEX = -100
"""Written into labels where a token is not to be learnt (prompts, padding); PyTorch's own default."""
