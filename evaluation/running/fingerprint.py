"""What makes a result what it is: data, prompts, protocol, model, decoding."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from evaluation.backend import ModelIdentity
from evaluation.task import CHOICES, Task

COMPLETIONS_ENGINE = "saved completions"
OPTIONAL = ("config_hash", "server", "tuned")
UNTOLD = ("none", "unknown", "")
QUESTIONS = ("num_samples", "data_hash", "prompt_hash")
"""The part of a fingerprint that says which questions are asked; the rest says how, and whom."""


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
    if (drawing := task.limits.drawing) is not None:
        decoding |= {"do_sample": True, **dataclasses.asdict(drawing)}
    # What is unknown or does not apply is left out, so that a run does not become another one when glmtune
    # learns to tell more.
    told = {name: value for name, value in dataclasses.asdict(model).items() if value or name not in OPTIONAL}
    own_prompt: dict[str, Any] = {"own_prompt": dict(task.own_prompt)} if task.own_prompt else {}
    return {
        "benchmark": task.benchmark,
        "split": task.split,
        "num_samples": len(task.samples),
        "data_hash": task.data_hash,
        "prompt_hash": task.prompt_hash,
        "protocol_version": task.protocol_version,
        "num_fewshot": task.num_fewshot,
        **own_prompt,
        "model": told,
        "decoding": decoding,
    }


def of_all_answers(values: Mapping[str, Any], num_answers: int | None = None) -> dict[str, Any]:
    """Return the fingerprint of a run that asks every question several times, from that of one time.

    Args:
        values: of any of the times.
        num_answers: to each question; None leaves them out, so that a run has one name however many.
    """
    decoding = {name: value for name, value in values["decoding"].items() if name != "number"}
    if num_answers is not None:
        decoding["num_answers"] = num_answers
    return {**values, "decoding": decoding}


def deciding(values: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a fingerprint that a journal must share to be continued.

    Args:
        values: a fingerprint. The name a model was called by does not matter where its weights are known.
    """
    model = dict(values["model"])
    if model["weights_hash"]:
        del model["name"]
    model.pop("tuned", None)  # a name, too; `adapter` is the hash of what it names
    return {**values, "model": model}


def differ_in_questions_only(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Say whether two runs are of one model that is asked in one way, whatever it is asked.

    Args:
        there: what `deciding` returned, as it was read back from a file.
        here: what it returns now.
    """
    here = json.loads(json.dumps(here))  # as it would be read back: tuples are lists
    names = {*there, *here} - {*QUESTIONS}
    return all(name in there and name in here and there[name] == here[name] for name in names)


def described(model: Mapping[str, Any]) -> str:
    """Return which model it is in words: its name, how it is quantized, and what is attached to it.

    >>> described({"name": "chatglm2-6b", "quantization": "int4", "adapter": "1f", "tuned": "prefix runs/a"})
    'chatglm2-6b, INT4, prefix runs/a'

    Args:
        model: its part of a fingerprint.
    """
    name, quantization = str(model["name"]), str(model["quantization"])
    words = [name]
    if quantization not in UNTOLD and not name.lower().endswith(quantization.lower()):
        words.append(quantization.upper())
    if tuned := tuned_words(model):
        words.append(tuned)
    return ", ".join(words)


def tuned_words(model: Mapping[str, Any]) -> str:
    """Return what is attached to a model, by its name or else by its hash; empty where nothing is.

    Args:
        model: its part of a fingerprint.
    """
    adapter = str(model["adapter"])
    if adapter in UNTOLD:
        return ""
    return str(model.get("tuned") or f"tuned {adapter[:8]}")


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
