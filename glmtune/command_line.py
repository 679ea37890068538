"""Command lines as text: the one that was typed, for the records, and the one to type next."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TYPED = "GLMTUNE_COMMAND"
"""Set by a launcher for its processes, whose own words nobody typed."""
HIDDEN = "***"
# The last part of a setting's or a variable's name; `max_new_tokens` and `tokenizer` are no secrets.
_SECRET_NAME = re.compile(
    r"(^|[_.-])(api_?key|key|token|secret|password|passwd|credentials?)$", re.IGNORECASE
)
# Forms that name their kind: Hugging Face, OpenAI and its like, GitHub, W&B; and user:password@ in URLs.
_SECRET_VALUE = re.compile(
    r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|wandb_v1_)[A-Za-z0-9_-]{12,}|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)"
)
SHORTEST_SECRET = 8
"""Values of secret variables are looked for from this length on: `KEY=1` would hide every 1."""


def typed_command() -> str:
    """Return the command that was typed, ready to be typed again, for files: secrets are left out.

    In a process of a launcher it is the launcher's.
    """
    if handed := os.environ.get(TYPED):
        return handed
    program = Path(sys.argv[0]).name
    return without_secrets(["glmtune" if program == "__main__.py" else program, *sys.argv[1:]])


def without_secrets(words: list[str], environment: Mapping[str, str] = os.environ) -> str:
    """Join words for a shell, without what must not stand in files.

    Hidden are values of settings whose name says that they are secret, what looks like an access token, and
    what the shell has put in from a variable with such a name; that becomes the reference by which one writes
    it. A reference (``${oc.env:NAME}``) stays as it was typed.

    Args:
        words: of a command.
        environment: variables, with their values.

    >>> without_secrets(["glmtune", "eval", "endpoint.api_key=abc", "endpoint.model=${oc.env:M}"], {})
    "glmtune eval 'endpoint.api_key=***' 'endpoint.model=${oc.env:M}'"
    """
    secrets = {
        value: f"${{oc.env:{name}}}"
        for name, value in environment.items()
        if len(value) >= SHORTEST_SECRET and _SECRET_NAME.search(name)
    }
    return shlex.join(_without_secrets(word, secrets) for word in words)


def _without_secrets(word: str, secrets: Mapping[str, str]) -> str:
    for value, reference in secrets.items():
        word = word.replace(value, reference)
    name, sign, value = word.partition("=")
    if sign and not value.startswith("${") and _SECRET_NAME.search(name.lstrip("-+~")):
        return f"{name}={HIDDEN}"
    return _SECRET_VALUE.sub(HIDDEN, word)


def command_words(command: str, settings: Mapping[str, Any]) -> str:
    """Word a command as one types it.

    Args:
        command: such as ``predict``.
        settings: by name; None and what is empty is left out.

    >>> command_words("predict", {"prefix_path": "runs/my ads", "data": "ads", "adapter_path": None})
    "glmtune predict 'prefix_path=runs/my ads' data=ads"
    """
    given = (f"{name}={value}" for name, value in settings.items() if value not in (None, "", ()))
    return shlex.join(["glmtune", command, *given])


def model_words(model: Mapping[str, Any], *, default: str = "glm-tiny") -> dict[str, Any]:
    """Return the settings by which a command takes the same model.

    Args:
        model: its settings: ``source`` and, if it is quantized on loading, how.
        default: what commands take when nothing is named.
    """
    source = str(model["source"])
    # A name alone is a preset, unless a folder of this name lies here.
    name = "model.source" if Path(source).exists() and Path(source).name == source else "model"
    bits = {key: model.get(key) for key in ("quantization", "quantization_bit")}
    return {name: None if source == default else source, **bits}


def data_words(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings by which ``predict`` takes the data of a run: rows held out, else the learnt ones.

    Args:
        data: the settings ``data`` of the run.
    """
    train = str(data["train_file"] or "")
    shipped = re.fullmatch(r"shipped:(\w+)/train\.jsonl", train)
    if shipped is not None:
        return {"data": shipped[1]}
    names = ("dir", "hub_subset", "prompt_column", "response_column", "history_column", "source_prefix")
    words: dict[str, Any] = {"data": data["name"], **{f"data.{name}": data[name] for name in names}}
    if data["name"] != "files":
        return words
    held_out = data["test_file"] or data["validation_file"]
    words["data.layout"] = None if data["layout"] == "auto" else data["layout"]
    if held_out is not None:
        return {**words, "data.test_file": held_out}
    return {**words, "data.train_file": train, "split": "train"}
