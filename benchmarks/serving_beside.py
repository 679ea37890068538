"""llama.cpp's server and vLLM beside `glmtune serve`, on random weights of one shape (`serving.py beside`).

The shape is ChatGLM2-6B's with four of its 28 layers. llama.cpp gets it as Q4_0, glmtune as INT4; vLLM gets
the export `format=transformers` in bfloat16, glmtune the folder it was made of. One thread each, prompts as
token ids to `/v1/completions`, the servers one after the other within a round.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving import HERE, environment, glmtune_server, load, server, wide_checkpoint

CLIENTS = (1, 16)
SHAPE = {"layers": 4, "hidden": 4096, "ffn": 13696, "vocab": 65024, "heads": 32}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every server in every round; tokens per second by number of clients."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = wide_checkpoint(options, folder)
        arms: dict[str, tuple[str, list[str]]] = {
            "glmtune INT4": ("wide", glmtune_server(model, options.port, "quantization=int4")),
            "glmtune bfloat16": ("wide", glmtune_server(model, options.port, "model.dtype=bfloat16")),
        }
        if options.llama_server:
            arms["llama.cpp Q4_0"] = ("any", llama_server(options, folder))
        if options.vllm_python:
            arms["vLLM bfloat16"] = ("wide", vllm_server(options, model, folder))
        rounds: list[dict[str, Any]] = []
        for number in range(options.rounds):
            found = {}
            for arm, (served, words) in arms.items():
                with server(words, options.port, folder / f"{number}.log"):
                    found[arm] = ask(options, served, number)
            rounds.append(found)
            sys.stderr.write(f"{found}\n")
    return {"rounds": rounds}


def ask(options: argparse.Namespace, served: str, number: int) -> dict[str, Any]:
    """Return tokens per second for each number of clients, after a short warm-up."""
    common = ["--api", "completions", "--prompt", "32", "--vocab", "60000"]
    load(options.port, served, *common, "--tokens", "4")
    seed = ["--seed", str(number * 1000)]
    return {
        f"{clients} clients": load(
            options.port, served, *common, *seed, "--tokens", str(options.tokens), "--clients", str(clients)
        )["tokens_per_second"]
        for clients in CLIENTS
    }


def llama_server(options: argparse.Namespace, folder: Path) -> list[str]:
    """Write the GGUF file (in a Python with `gguf`) and return the command that serves it."""
    shape = [word for key, value in SHAPE.items() for word in (f"--{key}", str(value))]
    script = [options.llama_python, str(HERE / "llama_cpp_inference.py"), *shape, "--type", "Q4_0", "--words"]
    more = ["--prompt", "1", "--new", "1", "--threads", "1", "--folder", str(folder), "--only-write"]
    subprocess.run([*script, *more], check=True)
    file = next(folder.glob("*.gguf"))
    slots = ["--parallel", "16", "--ctx-size", "8192", "--threads", "1", "--threads-batch", "1"]
    return [options.llama_server, "--model", str(file), "--port", str(options.port), *slots]


def vllm_server(options: argparse.Namespace, model: str, folder: Path) -> list[str]:
    """Export for transformers and return the command that serves it."""
    out = folder / "wide-transformers"
    words: Sequence[str] = [f"model={model}", "format=transformers", f"output_dir={out}"]
    subprocess.run([sys.executable, "-m", "glmtune", "export", *words], check=True, env=environment())
    program = [options.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(out)]
    limits = ["--dtype", "bfloat16", "--max-model-len", "512", "--max-num-seqs", "16"]
    return [*program, *limits, "--port", str(options.port), "--served-model-name", "wide"]
