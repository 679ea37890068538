"""The parts of a user's deepspeed.json that glmtune itself reads; the rest is for DeepSpeed to judge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, PositiveInt, ValidationError

from glmtune.errors import ConfigError


class _Offload(BaseModel):
    device: str | None = None


class _Zero(BaseModel):
    reduce_bucket_size: PositiveInt | Literal["auto"] = "auto"
    offload_optimizer: _Offload | Literal[False] | None = None
    offload_param: _Offload | Literal[False] | None = None


class _Optimizer(BaseModel):
    type: str | None = None


class _Parts(BaseModel):
    zero_optimization: _Zero
    optimizer: _Optimizer | None = None


# Where a value may be of two kinds, pydantic adds the kind that it tried to the path.
_KEYS = {name for part in (_Parts, _Zero, _Offload, _Optimizer) for name in part.model_fields}


def check_parts(config: Mapping[str, Any], path: Path) -> None:
    """Make sure that what will be read is of the kinds that are expected.

    Args:
        config: content of the file.
        path: the file, for the message.

    Raises:
        ConfigError: a value is of another kind; the first one is said.
    """
    try:
        _Parts.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part in _KEYS)
        raise ConfigError(
            f"`deepspeed.config_file`: {path} has `{place}` {str(first['input'])[:80]}, but the rule is: "
            f"{first['msg']}. Correct it."
        ) from error
