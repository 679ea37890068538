"""Compare training by glmtune with what users would take otherwise: speed, memory, the first step.

The same rows, the same model (an export in transformers' format), the same effective batch, one epoch,
float32, on one machine; every measurement is a process of its own, and the arms take turns. Parts:

adgen     LoRA on ADGEN's first rows
tail      LoRA on long-tailed chats: answers of 1 to 16 pieces of ADGEN's texts, most of them short
start     LoRA on a small model (`--start-model`) until the end of the first optimizer step
ptuning   a prefix over the frozen model, ADGEN's rows

Arms: `glmtune` and `glmtune-packed` by `glmtune train`; `trainer`, plain `Trainer` and PEFT (LoRA, or its
prefix tuning); `official`, the released script's layout (every row padded to the longest, logits everywhere)
around our prefix; and the tools given by `--peer`, each by the Python of an environment of its own.
`-grouped` behind a name turns on the tool's grouping by length, which glmtune has on.

Figures: real (not padding) tokens per second of the whole epoch, peak resident memory, seconds from the start
of the process to the end of its first optimizer step; of the processor, and in `--out` of the clock, too.
Tokens and labels of all arms are compared, and so are mean losses (the learning rate is too small to move
them). Steps and losses of every run are kept in `--out`.

    python benchmarks/make_checkpoint.py --hidden 512 --layers 6 --heads 8 --head-dim 64 --ffn 1376 \
        --seq-length 4096 --dtype float32 --format safetensors --tokenizer TOKENIZER_MODEL --out /tmp/official
    glmtune export model.source=/tmp/official format=transformers output_dir=/tmp/medium
    glmtune export format=transformers output_dir=/tmp/tiny
    python benchmarks/train_peers.py --model /tmp/medium --start-model /tmp/tiny --data-dir ADGEN \
        --peer llamafactory=PYTHON --peer swift=PYTHON --out /tmp/peers
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARM_FILE = Path(__file__).with_name("train_peers_arm.py")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
PEERS = ("llamafactory", "swift")
TOLERANCE = 0.01
"""Nats between the mean losses of arms that compute the same; prefixes begin with other random values."""
TEMPLATE_TOKENS = 32
"""More than a template adds to a question or an answer."""


@dataclass(frozen=True)
class Part:
    """What is trained.

    Attributes:
        method: `lora` or `prefix`.
        arms: without peers.
        takes_peers: whether tools given by `--peer` take part.
    """

    method: str
    arms: tuple[str, ...]
    takes_peers: bool = True


PARTS = {
    "adgen": Part("lora", ("glmtune", "trainer")),
    "tail": Part("lora", ("glmtune", "glmtune-packed", "trainer", "trainer-grouped")),
    "start": Part("lora", ("glmtune", "trainer")),
    "ptuning": Part("prefix", ("glmtune", "glmtune-packed", "official", "trainer"), takes_peers=False),
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder in transformers' format")
    parser.add_argument("--start-model", type=Path, help="of the part `start`, such as an export of glm-tiny")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with ADGEN's train.json")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=", ".join(PEERS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--arms", nargs="+", help="instead of those of the part, such as swift-grouped")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, runs and figures")
    parser.add_argument("--rows", type=int, default=48, help="rows of an epoch")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows in one forward pass")
    parser.add_argument("--accumulation", type=int, default=4, help="forward passes of an optimizer step")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pre-seq-len", type=int, default=128)
    parser.add_argument("--packing-length", type=int, default=1024, help="tokens of a packed row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def write_rows(options: argparse.Namespace, part: str) -> Path:
    """Write the rows of a part as messages, one JSON object a line."""
    with (options.data_dir / "train.json").open(encoding="utf-8") as file:
        given = [json.loads(next(file)) for _ in range(17 * options.rows)]
    number, drawn, rows = 0, random.Random(1), []
    for row in given[: options.rows]:
        pieces = [row["summary"]]
        if part == "tail":
            for _ in range(min(16, int(drawn.lognormvariate(0.4, 1.0))) or 0):
                number += 1
                pieces.append(given[options.rows + number]["summary"])
            pieces = pieces[1:] or [row["summary"][:40]]
        turns = (("user", row["content"]), ("assistant", "".join(pieces)))
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    path = options.out.resolve() / f"{part}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def row_lengths(rows: Path, model: Path) -> dict[str, int]:
    """Count tokens: of an average row, and of the longest question and answer, with room for the template."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]
    sizes = [[len(tokenizer.encode(turn["content"]).ids) for turn in each] for each in texts]
    source, target = (max(size) + TEMPLATE_TOKENS for size in zip(*sizes, strict=True))
    return {"mean": sum(map(sum, sizes)) // len(sizes), "source": source, "target": target}


def measure(options: argparse.Namespace, job: dict[str, Any], python: str) -> dict[str, Any]:
    """Train once in a process of its own and return its figures."""
    folder = Path(job["out"])
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    Path(job["result"]).unlink(missing_ok=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".job.json")
    file.write_text(json.dumps(job))
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    if python == sys.executable:
        environment["PYTHONPATH"] = str(ARM_FILE.parents[1])
    with folder.with_suffix(".log").open("w") as log:
        subprocess.run(
            [python, str(ARM_FILE), str(file)], env=environment, stdout=log, stderr=log, cwd=options.out
        )
    if not Path(job["result"]).is_file():
        raise SystemExit(f"{job['arm']} trained nothing; see {folder.with_suffix('.log')}")
    found = json.loads(Path(job["result"]).read_text())
    cpu, clock = found["steps"][-1]
    total = sum(loss * labels for loss, labels in found["losses"])
    return {
        "arm": job["arm"],
        "real_tokens": found["real"],
        "labels": found["labels"],
        "real_share": found["real"] / found["computed"],
        "tokens_per_cpu_second": found["real"] / cpu,
        "tokens_per_second": found["real"] / clock,
        "peak_mib": found["peak_mib"],
        "until_step_cpu": found["first_step"][0],
        "until_step_seconds": found["first_step"][1],
        "until_begin_cpu": found["until_begin"][0],
        "loss": total / max(1, sum(labels for _, labels in found["losses"])),
    }


def run_part(options: argparse.Namespace, name: str, pythons: dict[str, str]) -> None:
    """Let the arms of a part take turns and print their table."""
    part = PARTS[name]
    model = options.start_model if name == "start" else options.model
    if model is None:
        raise SystemExit(f"the part `{name}` needs {'--start-model' if name == 'start' else '--model'}")
    rows = write_rows(options, name)
    arms = list(options.arms or (*part.arms, *(pythons if part.takes_peers else ())))
    lengths = row_lengths(rows, model)
    longest = lengths["source"] + lengths["target"] + 1
    job = {
        "method": part.method, "model": str(model.resolve()), "rows": str(rows), "learning_rate": 1e-7,
        "micro_batch": options.micro_batch, "accumulation": options.accumulation, "rank": options.rank,
        "targets": TARGETS, "threads": options.threads, "lengths": lengths, "max_length": longest,
        "packing_length": max(options.packing_length, longest), "pre_seq_len": options.pre_seq_len,
        "pad_token_id": 0,
    }  # fmt: skip
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for turn in range(options.rounds):
        for arm in arms if turn % 2 == 0 else reversed(arms):
            place = options.out.resolve() / f"{name}-{arm}"
            tool = arm.removesuffix("-grouped").removesuffix("-packed")
            mine = {"arm": arm, "grouped": arm.endswith("-grouped"), "out": str(place)}
            found = measure(
                options, {**job, **mine, "result": f"{place}.json"}, pythons.get(tool, sys.executable)
            )
            results[arm].append(found)
            with (options.out / "figures.jsonl").open("a") as file:
                file.write(json.dumps({"part": name, "round": turn + 1, **found}) + "\n")
            sys.stderr.write(f"{name} round {turn + 1} {json.dumps(found)}\n")
    print_table(name, results)


def print_table(name: str, results: dict[str, list[dict[str, Any]]]) -> None:
    """Print medians, and ratios to the first arm within a round."""
    first = next(iter(results))
    print(
        f"\n| {name} | real tokens/s of the processor | x {first} | real share | peak MiB"
        " | first step, s of the processor | loss | range of tokens/s |\n|---|---|---|---|---|---|---|---|"
    )
    for arm, runs in results.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "arm"}
        speeds = [run["tokens_per_cpu_second"] for run in runs]
        base = [run["tokens_per_cpu_second"] for run in results[first]]
        ratio = statistics.median(a / b for a, b in zip(speeds, base, strict=True))
        print(
            f"| {arm} | {middle['tokens_per_cpu_second']:.0f} | {ratio:.2f} | {middle['real_share']:.0%}"
            f" | {middle['peak_mib']:,.0f} | {middle['until_step_cpu']:.1f} | {middle['loss']:.4f}"
            f" | {min(speeds):.0f} to {max(speeds):.0f} |",
            flush=True,
        )
    reference = results[first][0]
    for arm, runs in results.items():
        for key in ("real_tokens", "labels"):
            if runs[0][key] != reference[key]:
                print(f"{arm}: {runs[0][key]} {key}, {first} {reference[key]}", flush=True)
        if abs(runs[0]["loss"] - reference["loss"]) > TOLERANCE:
            print(f"{arm}: loss {runs[0]['loss']:.4f}, {first} {reference['loss']:.4f}", flush=True)


def main() -> None:
    """Run the parts."""
    options = parse_arguments()
    pythons = dict(peer.split("=", 1) for peer in options.peer)
    if unknown := set(pythons) - set(PEERS):
        raise SystemExit(f"--peer {unknown.pop()}: give one of {', '.join(PEERS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.parts:
        run_part(options, name, pythons)


if __name__ == "__main__":
    main()
