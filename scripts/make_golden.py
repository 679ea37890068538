"""Write tests/golden/models: tiny official checkpoints and what an independent forward pass says about them.

    python scripts/make_golden.py

The forward pass below uses plain tensor operations and official parameter names; it imports nothing of
glmtune or transformers, so that an agreement between the two means something. Everything runs in float64.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden_chatglm
import torch
from safetensors.torch import save_file
from torch import Tensor

TARGET = Path(__file__).resolve().parent.parent / "tests" / "golden" / "models"
BASE: dict[str, Any] = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "hidden_size": 24,
    "ffn_hidden_size": 20,
    "kv_channels": 8,
    "num_layers": 2,
    "num_attention_heads": 4,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "padded_vocab_size": 48,
    "seq_length": 512,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "torch_dtype": "float16",
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CASES: dict[str, dict[str, Any]] = {
    "chatglm2": {"_name_or_path": "THUDM/chatglm2-6b"},
    "chatglm2-32k": {"_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 16},
    "chatglm3": {"_name_or_path": "THUDM/chatglm3-6b", "multi_query_group_num": 1, "num_layers": 3},
    "glm4": {
        "_name_or_path": "THUDM/glm-4-9b-chat",
        "rope_ratio": 500,
        "layernorm_epsilon": 1.5625e-07,
        "torch_dtype": "bfloat16",
        "num_hidden_layers": 2,
        "eos_token_id": [40, 41, 42],
        "pad_token_id": 40,
    },
    "per-head": {"_name_or_path": "THUDM/chatglm2-6b", "multi_query_attention": False, "add_qkv_bias": False},
}
"""Folder → what differs from BASE. `glm4` is stored in one pickle, the others in safetensors shards."""


def random_weights(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Draw weights under official names, rounded to the stored type."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config["torch_dtype"])
    heads, width, hidden = config["num_attention_heads"], config["kv_channels"], config["hidden_size"]
    groups = config["multi_query_group_num"] if config["multi_query_attention"] else heads

    def draw(*shape: int, around: float = 0.0, scale: float = 0.25) -> Tensor:
        return (around + scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    vocab, ffn = config["padded_vocab_size"], config["ffn_hidden_size"]
    weights = {"transformer.embedding.word_embeddings.weight": draw(vocab, hidden, scale=1.0)}
    weights["transformer.rotary_pos_emb.inv_freq"] = draw(width // 4)  # must be ignored by a reader
    for layer in range(config["num_layers"]):
        name = f"transformer.encoder.layers.{layer}."
        rows = (heads + 2 * groups) * width
        weights[name + "input_layernorm.weight"] = draw(hidden, around=1.0)
        weights[name + "self_attention.query_key_value.weight"] = draw(rows, hidden)
        if config["add_qkv_bias"]:
            weights[name + "self_attention.query_key_value.bias"] = draw(rows)
        weights[name + "self_attention.dense.weight"] = draw(hidden, heads * width)
        weights[name + "post_attention_layernorm.weight"] = draw(hidden, around=1.0)
        weights[name + "mlp.dense_h_to_4h.weight"] = draw(2 * ffn, hidden)
        weights[name + "mlp.dense_4h_to_h.weight"] = draw(hidden, ffn)
    weights["transformer.encoder.final_layernorm.weight"] = draw(hidden, around=1.0)
    weights["transformer.output_layer.weight"] = draw(vocab, hidden, scale=0.5)
    return weights


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square of the last axis."""
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, positions: Tensor, config: dict[str, Any], name: str) -> Tensor:
    """Turn neighbouring pairs of the first half of the channels; x is [length, heads, width]."""
    ratio, rotated = config.get("rope_ratio", 1), config["kv_channels"] // 2
    base, where = (
        (10000.0, positions / ratio) if name.startswith("chatglm2") else (10000.0 * ratio, positions)
    )
    speeds = torch.tensor([base ** (-2 * i / rotated) for i in range(rotated // 2)], dtype=torch.float64)
    turn = torch.polar(torch.ones((), dtype=torch.float64), where[:, None].double() * speeds)
    pairs = torch.view_as_complex(x[..., :rotated].reshape(*x.shape[:-1], rotated // 2, 2).contiguous())
    turned = torch.view_as_real(pairs * turn[:, None, :]).flatten(-2)
    return torch.cat((turned, x[..., rotated:]), dim=-1)


def attention(
    x: Tensor, positions: Tensor, weights: dict[str, Tensor], layer: str, case: tuple[dict, str]
) -> Tensor:
    """Causal grouped attention of one row; x is [length, hidden]."""
    config, name = case
    heads, width = config["num_attention_heads"], config["kv_channels"]
    fused = x @ weights[layer + "query_key_value.weight"].T
    if config["add_qkv_bias"]:
        fused = fused + weights[layer + "query_key_value.bias"]
    if config["multi_query_attention"]:
        groups = config["multi_query_group_num"]
        query, key, value = fused.split([heads * width, groups * width, groups * width], dim=-1)
        query, key, value = (part.unflatten(-1, (-1, width)) for part in (query, key, value))
    else:
        groups = heads
        query, key, value = fused.unflatten(-1, (heads, 3, width)).unbind(-2)
    query, key = rotate(query, positions, config, name), rotate(key, positions, config, name)
    length, outputs = len(x), []
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for head in range(heads):
        group = head // (heads // groups)
        scores = query[:, head] @ key[:, group].T / math.sqrt(width)
        outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ value[:, group])
    return torch.cat(outputs, dim=-1) @ weights[layer + "dense.weight"].T


def forward(ids: Tensor, positions: Tensor, weights: dict[str, Tensor], case: tuple[dict, str]) -> Tensor:
    """Logits of one row without padding, [length, vocab]."""
    config, eps = case[0], case[0]["layernorm_epsilon"]
    x = weights["transformer.embedding.word_embeddings.weight"][ids]
    for index in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{index}."
        normed = rms_norm(x, weights[layer + "input_layernorm.weight"], eps)
        x = x + attention(normed, positions, weights, layer + "self_attention.", case)
        normed = rms_norm(x, weights[layer + "post_attention_layernorm.weight"], eps)
        gate, up = (normed @ weights[layer + "mlp.dense_h_to_4h.weight"].T).chunk(2, dim=-1)
        x = x + (gate * gate.sigmoid() * up) @ weights[layer + "mlp.dense_4h_to_h.weight"].T
    x = rms_norm(x, weights["transformer.encoder.final_layernorm.weight"], eps)
    return x @ weights["transformer.output_layer.weight"].T


def expected_values(
    weights: dict[str, Tensor], config: dict[str, Any], name: str, seed: int
) -> dict[str, Tensor]:
    """Logits of a short and a far row, and loss and some gradients of the short one."""
    generator = torch.Generator().manual_seed(seed)
    exact = {key: value.double().requires_grad_() for key, value in weights.items() if "inv_freq" not in key}
    ids = torch.randint(3, config["padded_vocab_size"], (12,), generator=generator)
    near = torch.arange(12)
    mixed = torch.where(near % 2 == 1, near + config["seq_length"] - 12, near)
    logits, far_logits = (forward(ids, where, exact, (config, name)) for where in (near, mixed))
    loss = torch.nn.functional.cross_entropy(logits[5:-1], ids[6:])
    loss.backward()
    fused = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
    up = "transformer.encoder.layers.1.mlp.dense_h_to_4h.weight"
    found = {"input_ids": ids, "far_position_ids": mixed, "logits": logits, "loss": loss}
    found |= {"far_logits": far_logits} | {f"gradient.{key}": exact[key].grad for key in (fused, up)}
    return {key: value.detach().clone().contiguous() for key, value in found.items() if value is not None}


def store(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write one checkpoint: a single pickle, or safetensors in two shards with their index."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if config["torch_dtype"] == "bfloat16":
        torch.save(weights, folder / "pytorch_model.bin")
        return
    names, half = list(weights), len(weights) // 2
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: weights[key] for key in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in weights.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    """Write everything, unless this script differs from its committed version."""
    root = TARGET.parent.parent.parent
    sources = [Path(__file__), Path(golden_chatglm.__file__)]
    git = ["git", "-C", str(root), "status", "--porcelain", "--", *map(str, sources)]
    if subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip():
        sys.exit(
            "The golden scripts have uncommitted changes; commit them first: fixtures must be traceable."
        )
    for seed, (name, differences) in enumerate(CASES.items(), start=1):
        config, folder = BASE | differences, TARGET / name
        folder.mkdir(parents=True, exist_ok=True)
        weights = random_weights(config, seed)
        store(folder, config, weights)
        save_file(expected_values(weights, config, name, 100 + seed), folder / "expected.safetensors")
    for seed, (name, differences) in enumerate(golden_chatglm.CASES.items(), start=51):
        config, folder = golden_chatglm.BASE | differences, TARGET / name
        folder.mkdir(parents=True, exist_ok=True)
        weights = golden_chatglm.random_weights(config, seed)
        store(folder, config, weights)
        expected = golden_chatglm.expected_values(weights, config, 100 + seed)
        save_file(expected, folder / "expected.safetensors")
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    (TARGET / "README.md").write_text(README.format(digest=digest))


README = f"""# Golden model fixtures

Tiny random checkpoints in the official layout; logits, loss and gradients of an independent forward pass.

| | |
|---|---|
| source | `scripts/make_golden.py`, `golden_chatglm.py` (sha256 of both `{{digest}}`); nothing downloaded |
| command | `python scripts/make_golden.py` |
| versions | Python {sys.version.split()[0]}, torch {torch.__version__}, one thread |
| arithmetic | float64; weights rounded to the stored type first |
| tolerance | logits 1e-5, loss 1e-5, gradients 1e-5 of the largest entry: float32 rounding of the model |

`far_position_ids` alternate between the start and the end of the position table: a wrong rotary rule shows.
`inv_freq` entries hold noise on purpose: readers must ignore them. The `chatglm` folders are the first
generation, with a row that ends in gMASK and one with MASK inside.
"""


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
