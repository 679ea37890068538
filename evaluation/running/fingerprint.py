"""What makes a result what it is: data, prompts, protocol, model, decoding."""

from __future__ import annotations

import dataclasses
from typing import Any

from evaluation.backend import ModelIdentity
from evaluation.task import CHOICES, Task

COMPLETIONS_ENGINE = "saved completions"


def fingerprint(task: Task, model: ModelIdentity, max_context_tokens: int | None) -> dict[str, Any]:
    """Return the fingerprint of a run, as ``results.json`` holds it.

    Args:
        task: what was asked.
        model: who answered.
        max_context_tokens: the model's context, which decides how many exemplars fit; None if unknown.
    """
    # Only what the protocol uses: runs that generate nothing do not differ by a limit of generation.
    decoding: dict[str, Any] = {"do_sample": False, "max_context_tokens": max_context_tokens}
    if task.kind != CHOICES:
        decoding |= {"max_new_tokens": task.limits.max_new_tokens, "stop": list(task.limits.stop)}
    return {
        "benchmark": task.benchmark,
        "split": task.split,
        "num_samples": len(task.samples),
        "data_hash": task.data_hash,
        "prompt_hash": task.prompt_hash,
        "protocol_version": task.protocol_version,
        "num_fewshot": task.num_fewshot,
        "model": dataclasses.asdict(model),
        "decoding": decoding,
    }


def deciding(values: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a fingerprint that a journal must share to be continued.

    Args:
        values: a fingerprint. The name a model was called by does not matter where its weights are known.
    """
    model = dict(values["model"])
    if model["weights_hash"]:
        del model["name"]
    return {**values, "model": model}


def saved_identity(name: str, digest: str) -> ModelIdentity:
    """Return the identity of whoever wrote a file of completions.

    Args:
        name: of the model, or else of the file.
        digest: of its bytes.
    """
    return ModelIdentity(
        name=name,
        weights_hash=f"completions {digest[:16]}",
        family="",
        dtype="",
        quantization="unknown",
        adapter="none",
        is_chat=True,
        engine=COMPLETIONS_ENGINE,
    )
