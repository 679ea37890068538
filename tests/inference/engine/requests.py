"""Requests of all kinds for the tests of the engine, adapters on disk, and engines driven step by step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from glmtune.inference.engine.engine import Engine
from glmtune.inference.requests.generation import Generated
from glmtune.inference.requests.request import Request
from glmtune.inference.requests.sampling import Sampling
from glmtune.inference.settings import EngineSettings
from glmtune.models.load import load_official
from glmtune.prefix.checkpoint import save_prefix
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
from tests.inference.engine.cases import FAMILIES, GOLDEN, shared_prompts

STOP = frozenset({7, 11, 23})


def load(name: str) -> Any:
    """Return a tiny model with a head of its own: under a tied one it repeats its last token."""
    model = load_official(GOLDEN / name, dtype="float32", device="cpu", family=FAMILIES[name])
    torch.manual_seed(4)
    model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.lm_head.weight))
    return model


def write_prefix(model: Any, folder: Path, *, seed: int, length: int, gate: bool = False) -> Path:
    """Save a random prefix, with gates that are open if it is to have some."""
    torch.manual_seed(seed)
    num_gates = model.config.num_attention_heads if gate else None
    encoder = PrefixEncoder(prefix_shape(model.config), pre_seq_len=length, num_gates=num_gates)
    if encoder.gate is not None:
        torch.nn.init.normal_(encoder.gate.weight, std=2)
    return save_prefix(encoder, folder)


def write_lora(model: Any, folder: Path, *, seed: int) -> Path:
    """Save a random LoRA over all layers' attention."""
    from peft import LoraConfig, get_peft_model

    names = ["query_key_value"] if model.family == "chatglm" else ["q_proj", "v_proj"]
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=4, target_modules=names, lora_alpha=8, task_type="CAUSAL_LM")
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, weight in adapted.named_parameters():
            if "lora_" in key:
                weight.normal_(std=0.6)
    adapted.save_pretrained(str(folder))
    return folder


def add_adapters(engine: Engine, model: Any, folder: Path) -> None:
    """Add two prefixes of unlike length, two gated ones, and two LoRAs."""
    engine.add_adapter("short", write_prefix(model, folder / "short", seed=1, length=3))
    engine.add_adapter("long", write_prefix(model, folder / "long", seed=2, length=9))
    engine.add_adapter("gated", write_prefix(model, folder / "gated", seed=5, length=4, gate=True))
    engine.add_adapter("gated-b", write_prefix(model, folder / "gated-b", seed=6, length=7, gate=True))
    engine.add_adapter("lora-a", write_lora(model, folder / "lora-a", seed=3), kind="lora")
    engine.add_adapter("lora-b", write_lora(model, folder / "lora-b", seed=4), kind="lora")


def mixed_requests(model: Any) -> list[Request]:
    """Prefixes, LoRAs, strengths of both and none; greedy and sampled; several lengths."""
    prompts = shared_prompts(model.config)
    kinds = [
        ("", 1.0), ("short", 1.0), ("long", 0.4), ("lora-a", 1.0), ("long", 1.0), ("", 1.0),
        ("lora-b", 1.0), ("short", 2.5), ("short", 0.0), ("lora-a", 0.5), ("long", 0.4),
        ("gated", 1.0), ("gated-b", 1.0), ("gated", 0.4), ("gated", 1.0), ("gated-b", 0.0),
    ]  # fmt: skip
    ways = [
        Sampling(max_new_tokens=12),
        Sampling(max_new_tokens=9, temperature=0.8, top_p=0.9, seed=5),
        Sampling(max_new_tokens=15, temperature=1.2, top_k=8, seed=6, repetition_penalty=1.1),
        Sampling(max_new_tokens=5, ignore_eos=True, logprobs=2),
        Sampling(max_new_tokens=14),
        Sampling(max_new_tokens=16, logprobs=1, repetition_penalty=1.05),
        Sampling(max_new_tokens=13, ignore_eos=True),
    ]
    return [
        Request(
            prompt_ids=tuple(prompts[place % len(prompts)]),
            sampling=ways[place % len(ways)],
            stop_ids=STOP,
            adapter=kinds[place % len(kinds)][0],
            strength=kinds[place % len(kinds)][1],
        )
        for place in range(2 * len(kinds))
    ]


def finish(engine: Engine, most_steps: int = 2000) -> None:
    """Step until nothing is left to do."""
    for _ in range(most_steps):
        if not engine.step():
            return
    raise AssertionError("the engine does not come to an end")


def alone(engine: Engine, request: Request) -> Generated:
    """Run a request when nothing else runs."""
    generation = engine.submit(request)
    finish(engine)
    return generation.result()


def engine_of(model: Any, folder: Path | None = None, **settings: Any) -> Engine:
    """Return an engine that is not started, with adapters where there is a folder for them."""
    engine = Engine(model, EngineSettings(**settings))
    if folder is not None:
        add_adapters(engine, model, folder)
    return engine
