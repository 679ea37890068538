"""An independent forward pass of ChatGLM-6B for `make_golden.py`: plain operations, float64, one row."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BASE: dict[str, Any] = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "hidden_size": 24,
    "inner_hidden_size": 40,
    "num_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 48,
    "max_sequence_length": 512,
    "layernorm_epsilon": 1e-5,
    "position_encoding_2d": True,
    "mask_token_id": 40,
    "gmask_token_id": 41,
    "bos_token_id": 44,
    "eos_token_id": 45,
    "pad_token_id": 3,
    "torch_dtype": "float16",
    "_name_or_path": "THUDM/chatglm-6b",
}
CASES: dict[str, dict[str, Any]] = {
    "chatglm": {},
    "chatglm-1d": {"position_encoding_2d": False, "num_layers": 3},
    "chatglm-march": {"glmtune_position_rule": "march_2023"},
}
"""Folder → what differs from BASE."""


def random_weights(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Draw weights under official names, rounded to the stored type."""
    generator = torch.Generator().manual_seed(seed)
    dtype, hidden = getattr(torch, config["torch_dtype"]), config["hidden_size"]
    inner = config["inner_hidden_size"]

    def draw(*shape: int, around: float = 0.0, scale: float = 0.25) -> Tensor:
        return (around + scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    def draw_pair(name: str, rows: int, columns: int | None = None) -> dict[str, Tensor]:
        weight = draw(hidden, around=1.0) if columns is None else draw(rows, columns)
        return {name + ".weight": weight, name + ".bias": draw(rows)}

    weights = {"transformer.word_embeddings.weight": draw(config["vocab_size"], hidden, scale=1.0)}
    for index in range(config["num_layers"]):
        layer = f"transformer.layers.{index}."
        weights[layer + "attention.rotary_emb.inv_freq"] = draw(4)  # must be ignored by a reader
        weights |= draw_pair(layer + "input_layernorm", hidden)
        weights |= draw_pair(layer + "attention.query_key_value", 3 * hidden, hidden)
        weights |= draw_pair(layer + "attention.dense", hidden, hidden)
        weights |= draw_pair(layer + "post_attention_layernorm", hidden)
        weights |= draw_pair(layer + "mlp.dense_h_to_4h", inner, hidden)
        weights |= draw_pair(layer + "mlp.dense_4h_to_h", hidden, inner)
    weights |= draw_pair("transformer.final_layernorm", hidden)
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].clone()
    return weights


def positions(ids: list[int], config: dict[str, Any]) -> list[list[int]]:
    """Numbers of every token, one list per stream, written out token by token."""
    sop = ids.index(config["bos_token_id"])
    has_gmask = config["gmask_token_id"] in ids
    mask = ids.index(config["gmask_token_id" if has_gmask else "mask_token_id"])
    keeps_sop = config.get("glmtune_position_rule") == "march_2023" and has_gmask
    first = [place if place < sop or (place == sop and keeps_sop) else mask for place in range(len(ids))]
    second = [max(0, place - sop + 1) for place in range(len(ids))]
    if config["position_encoding_2d"]:
        return [first, second]
    return [list(range(len(ids))) if has_gmask else first]


def rotate(x: Tensor, place: int, width: int) -> Tensor:
    """Turn one vector: entry i against entry i + width / 2."""
    out = x.clone()
    for i in range(width // 2):
        speed = torch.tensor(10000.0 ** (-2 * i / width), dtype=torch.float32).half().double().item()
        cos, sin = math.cos(place * speed), math.sin(place * speed)
        a, b = x[i], x[i + width // 2]
        out = out.index_put(
            (torch.tensor([i, i + width // 2]),), torch.stack((a * cos - b * sin, a * sin + b * cos))
        )
    return out


def norm(x: Tensor, weights: dict[str, Tensor], name: str, eps: float) -> Tensor:
    """Subtract the mean, divide by the standard deviation, scale and shift."""
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return scaled * weights[name + ".weight"] + weights[name + ".bias"]


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """Multiply by a stored matrix and add its bias."""
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def attention(
    x: Tensor, streams: list[list[int]], sop: int, weights: dict[str, Tensor], layer: str, heads: int
) -> Tensor:
    """Attention of one row, head by head; tokens before sop see each other, later ones all before them."""
    length, hidden = x.shape
    width = hidden // heads
    share = width // len(streams)
    fused = linear(x, weights, layer + "query_key_value").view(length, heads, 3, width)

    def turned(vector: Tensor, token: int) -> Tensor:
        parts = [
            rotate(part, stream[token], share)
            for part, stream in zip(vector.split(share), streams, strict=True)
        ]
        return torch.cat(parts)

    outputs = []
    for token in range(length):
        seen = range(max(sop, token + 1))
        for head in range(heads):
            query = turned(fused[token, head, 0], token)
            keys = torch.stack([turned(fused[other, head, 1], other) for other in seen])
            values = torch.stack([fused[other, head, 2] for other in seen])
            outputs.append((keys @ query / math.sqrt(width)).softmax(0) @ values)
    return linear(torch.cat(outputs).view(length, hidden), weights, layer + "dense")


def forward(ids: list[int], weights: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """Logits of one row, [length, vocab]."""
    eps, heads, alpha = config["layernorm_epsilon"], config["num_attention_heads"], math.sqrt(56)
    streams, sop = positions(ids, config), ids.index(config["bos_token_id"])
    x = weights["transformer.word_embeddings.weight"][ids]
    for index in range(config["num_layers"]):
        layer = f"transformer.layers.{index}."
        normed = norm(x, weights, layer + "input_layernorm", eps)
        x = alpha * normed + attention(normed, streams, sop, weights, layer + "attention.", heads)
        normed = norm(x, weights, layer + "post_attention_layernorm", eps)
        inner = linear(normed, weights, layer + "mlp.dense_h_to_4h")
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = alpha * normed + linear(inner, weights, layer + "mlp.dense_4h_to_h")
    x = norm(x, weights, "transformer.final_layernorm", eps)
    return x @ weights["transformer.word_embeddings.weight"].T


def expected_values(weights: dict[str, Tensor], config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Logits of a row with gMASK and of one with MASK inside; loss and some gradients of the first."""
    generator = torch.Generator().manual_seed(seed)
    exact = {
        name: value.double().requires_grad_() for name, value in weights.items() if "inv_freq" not in name
    }
    words: list[int] = torch.randint(4, 40, (14,), generator=generator).tolist()
    mask, gmask, sop = (config[name] for name in ("mask_token_id", "gmask_token_id", "bos_token_id"))
    rows = {
        "gmask": [*words[:4], mask, *words[4:7], gmask, sop, *words[7:11], config["eos_token_id"]],
        "inside": [*words[:3], mask, *words[3:6], sop, *words[11:]],
    }
    logits = {name: forward(ids, exact, config) for name, ids in rows.items()}
    sop_place = rows["gmask"].index(sop)
    loss = torch.nn.functional.cross_entropy(
        logits["gmask"][sop_place:-1], torch.tensor(rows["gmask"][sop_place + 1 :])
    )
    loss.backward()
    found = {f"{name}.input_ids": torch.tensor(ids) for name, ids in rows.items()}
    found |= {f"{name}.logits": value for name, value in logits.items()} | {"loss": loss}
    for name in (
        "word_embeddings.weight",
        "layers.0.attention.query_key_value.weight",
        "layers.1.mlp.dense_h_to_4h.bias",
    ):
        gradient = exact[f"transformer.{name}"].grad
        assert gradient is not None
        found[f"gradient.transformer.{name}"] = gradient
    return {name: value.detach().clone().contiguous() for name, value in found.items()}
