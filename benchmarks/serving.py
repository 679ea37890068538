"""The server beside one request at a time, `model.chat`, llama.cpp's server and vLLM, in interleaved rounds.

    python benchmarks/serving.py many  --out many.json       16 clients, one, one after sixteen, model.chat
    python benchmarks/serving.py int4  --tokenizer FOLDER    the same over INT4 at 6B widths (few layers)
    python benchmarks/serving.py stall --out stall.json      a long prompt is read while a stream runs
    python benchmarks/serving.py soak  --out soak.json       64 clients that come and go, for two minutes
    python benchmarks/serving.py ties  --out ties.json       greedy answers alone and in a batch
    python benchmarks/serving.py beside --llama-server FILE --vllm-python FILE --out beside.json

Clients run in a process of their own (`serving_load.py`), greedy, with answers of fixed length. One thread
computes (`OMP_NUM_THREADS=1`), so that a machine of two cores has one for the clients. `beside` needs
llama.cpp's `llama-server` and a Python with vLLM's CPU build; what is not named is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil

HERE = Path(__file__).resolve().parent
CHAT = """
import json, sys, time
import torch, glmtune
model = glmtune.load_model({model!r}, quantization={quantization!r})
tokenizer = glmtune.load_tokenizer({model!r})
settings = dict(do_sample=False, max_new_tokens={tokens}, min_new_tokens={tokens})
model.chat(tokenizer, "1+1", **settings)
for line in sys.stdin:
    start = time.perf_counter()
    model.chat(tokenizer, line.strip(), **settings)
    print(json.dumps({tokens} / (time.perf_counter() - start)), flush=True)
"""
WIDE = ["--layers", "4", "--hidden", "4096", "--ffn", "13696", "--heads", "32", "--dtype", "bfloat16"]
"""The widths of ChatGLM2-6B; four of its 28 layers."""


def environment() -> dict[str, str]:
    """Return the environment of every process: one thread, this checkout."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}


@contextmanager
def process(words: Sequence[str], log: Path, **more: Any) -> Generator[subprocess.Popen[str]]:
    """Run a program during a block; its output goes to a file."""
    with log.open("w") as file:
        running = subprocess.Popen(
            words, stdout=more.pop("stdout", file), stderr=file, text=True, env=environment(), **more
        )
    try:
        yield running
    finally:
        running.terminate()
        running.wait(30)


@contextmanager
def server(words: Sequence[str], port: int, log: Path) -> Generator[psutil.Process]:
    """Run a server during a block that begins once it answers."""
    with process(words, log) as running:
        for _ in range(1200):
            if running.poll() is not None:
                raise SystemExit(f"the server ended: {log.read_text()[-2000:]}")
            try:
                if httpx2.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            except httpx2.HTTPError:
                pass
            time.sleep(0.5)
        yield psutil.Process(running.pid)


def glmtune_server(model: str, port: int, *words: str) -> list[str]:
    """Return the command that serves a model."""
    return [sys.executable, "-m", "glmtune", "serve", f"model={model}", f"port={port}", *words]


def load(port: int, model: str, *words: str) -> dict[str, Any]:
    """Let clients ask and return what they saw."""
    command = [sys.executable, str(HERE / "serving_load.py"), "--url", f"http://127.0.0.1:{port}"]
    done = subprocess.run(
        [*command, "--model", model, *words], capture_output=True, text=True, check=True, env=environment()
    )
    found: dict[str, Any] = json.loads(done.stdout)
    if found["num_errors"]:
        raise SystemExit(f"errors: {found['errors']}")
    return found


def cpu_seconds(running: psutil.Process) -> float:
    """Return the processor time of a process and its children so far."""
    return sum(
        each.cpu_times().user + each.cpu_times().system
        for each in [running, *running.children(recursive=True)]
    )


def measured(running: psutil.Process, port: int, model: str, *words: str) -> dict[str, float]:
    """Return tokens per second, and per second of the server's processor time."""
    before = cpu_seconds(running)
    found = load(port, model, *words)
    return {
        "tokens_per_second": found["tokens_per_second"],
        "tokens_per_cpu_second": found["tokens"] / (cpu_seconds(running) - before),
        "first_median": found["first_median"],
    }


def many(options: argparse.Namespace) -> dict[str, Any]:
    """Measure sixteen clients, one, one right after sixteen, and `model.chat`, in turn."""
    tokens, rounds = str(options.tokens), []
    name = Path(options.model).name
    served = [f"quantization={options.quantization}"] if options.quantization else []
    script = CHAT.format(model=options.model, quantization=options.quantization, tokens=options.tokens)
    with (
        tempfile.TemporaryDirectory() as folder,
        server(
            glmtune_server(options.model, options.port, *served), options.port, Path(folder, "server.log")
        ) as running,
        process(
            [sys.executable, "-c", script],
            Path(folder, "chat.log"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as chat,
    ):
        assert chat.stdin is not None
        assert chat.stdout is not None
        load(options.port, name, "--tokens", "8")
        for number in range(options.rounds):
            seed = ["--tokens", tokens, "--seed", str(number * 1000)]
            found = {"one": measured(running, options.port, name, *seed, "--requests", "4")}
            found["sixteen"] = measured(
                running, options.port, name, *seed, "--clients", "16", "--requests", "2"
            )
            found["one_after"] = measured(running, options.port, name, *seed, "--requests", "4")
            speeds = []
            for each in range(4):
                chat.stdin.write(
                    f"{each + number * 1000}+{each * 7 % 90}等于多少？请再说一遍。请再说一遍。\n"
                )
                chat.stdin.flush()
                speeds.append(json.loads(chat.stdout.readline()))
            rounds.append({**found, "chat": statistics.median(speeds)})
            sys.stderr.write(json.dumps(rounds[-1]) + "\n")
    return {"rounds": rounds, "ratios": ratios(rounds)}


def ratios(rounds: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return median, least and greatest of each ratio over the rounds."""

    def of(upper: str, lower: str, key: str) -> list[float]:
        values = [each[upper][key] / each[lower][key] for each in rounds]
        return [statistics.median(values), min(values), max(values)]

    def to_chat(name: str) -> list[float]:
        values = [each[name]["tokens_per_second"] / each["chat"] for each in rounds]
        return [statistics.median(values), min(values), max(values)]

    return {
        "sixteen / one": of("sixteen", "one", "tokens_per_second"),
        "sixteen / one, per CPU-second": of("sixteen", "one", "tokens_per_cpu_second"),
        "one / model.chat": to_chat("one"),
        "one after sixteen / model.chat": to_chat("one_after"),
    }


def int4(options: argparse.Namespace) -> dict[str, Any]:
    """Measure like `many` over INT4 at the widths of 6B."""
    with tempfile.TemporaryDirectory() as folder:
        options.model = wide_checkpoint(options, Path(folder))
        options.quantization = "int4"
        return many(options)


def wide_checkpoint(options: argparse.Namespace, folder: Path) -> str:
    """Write random weights at 6B widths, with the tokenizer of the release."""
    if options.tokenizer is None:
        raise SystemExit("name the folder of ChatGLM2-6B's tokenizer.model: --tokenizer FOLDER")
    out = folder / "wide"
    words = [*WIDE, "--vocab", "65024", "--std", "0.01"]
    words += ["--tokenizer", str(options.tokenizer), "--out", str(out)]
    script = str(HERE / "make_checkpoint.py")
    subprocess.run([sys.executable, script, *words], check=True, env=environment())
    return str(out)


def stall(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the longest wait of a running stream without and with a long prompt beside it."""
    name, rounds = Path(options.model).name, []
    with (
        tempfile.TemporaryDirectory() as folder,
        server(glmtune_server(options.model, options.port), options.port, Path(folder, "server.log")),
    ):
        load(options.port, name, "--tokens", "8")
        for number in range(options.rounds):
            alone = load(options.port, name, "--tokens", str(options.tokens), "--seed", str(number))
            words = [sys.executable, str(HERE / "serving_load.py"), "--model", name, "--tokens", "1"]
            words += ["--url", f"http://127.0.0.1:{options.port}", "--api", "completions"]
            words += ["--prompt", str(options.long_prompt), "--seed", str(number), "--requests", "1"]
            reading = subprocess.run(words, capture_output=True, text=True, check=True, env=environment())
            words[words.index("--seed") + 1] = str(number + 500)
            beside = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment())
            running = load(options.port, name, "--tokens", str(options.tokens), "--seed", str(number + 100))
            beside.communicate()
            rounds.append(
                {
                    "step": 1 / alone["tokens_per_second"],
                    "longest_wait_alone": alone["longest_wait"],
                    "longest_wait_beside": running["longest_wait"],
                    "reading_seconds": json.loads(reading.stdout)["seconds"],
                }
            )
            sys.stderr.write(json.dumps(rounds[-1]) + "\n")
    return {"rounds": rounds}


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Let 64 clients come and go; look at errors, memory and `/health`."""
    name, memory = Path(options.model).name, []
    with (
        tempfile.TemporaryDirectory() as folder,
        server(
            glmtune_server(options.model, options.port), options.port, Path(folder, "server.log")
        ) as running,
    ):
        words = ["--clients", "64", "--tokens", "64", "--leave", "--health"]
        load(options.port, name, *words, "--seconds", "20")
        for _ in range(3):
            memory.append(running.memory_info().rss)
            found = load(options.port, name, *words, "--seconds", str(options.seconds / 3))
            sys.stderr.write(json.dumps(found) + "\n")
        memory.append(running.memory_info().rss)
    return {"last": found, "rss_bytes": memory}


def beside(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the servers of others on the same shape, rounds in turn."""
    import serving_beside

    return serving_beside.run(options)


def ties(options: argparse.Namespace) -> dict[str, Any]:
    """Count the greedy answers that a mixed batch changes, and how close their choices were."""
    import serving_ties

    return serving_ties.run(options)


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["many", "int4", "stall", "soak", "beside", "ties"])
    parser.add_argument("--model", default="glm-tiny")
    parser.add_argument("--quantization", default="")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long-prompt", type=int, default=800, help="tokens, for `stall`")
    parser.add_argument("--seconds", type=float, default=120, help="for `soak`")
    parser.add_argument("--tokenizer", type=Path, help="of ChatGLM2-6B, for `int4` and `beside`")
    parser.add_argument("--llama-server", help="llama.cpp's program, for `beside`")
    parser.add_argument("--llama-python", help="a Python with `gguf` and `llama-cpp-python`, for `beside`")
    parser.add_argument("--vllm-python", help="a Python with vLLM, for `beside`")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.quantization = options.quantization or None
    found = {"what": options.what, **globals()[options.what](options)}
    text = json.dumps(found, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
