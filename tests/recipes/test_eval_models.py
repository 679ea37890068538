"""`glmtune eval` with a prefix, a LoRA adapter, several processes, and a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from glmtune.cli import main

FEW = [
    "benchmark=mmlu",
    "benchmark.data_dir=sample",
    "benchmark.limit=1",
    "protocol=few_shot_direct",
    "num_threads=1",
]


pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> dict[str, Path]:
    """Run folders of glm-tiny whose `last` holds a random prefix, and a random LoRA adapter."""
    from glmtune.models.load import load_official
    from glmtune.prefix.checkpoint import PrefixMeta, save_prefix
    from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
    from glmtune.training.adapt import tune_adapter
    from glmtune.training.checkpoints.folder import writing
    from glmtune.training.settings import LoraSettings

    torch.manual_seed(1)
    folder, model = tmp_path_factory.mktemp("tuned"), load_official("glm-tiny")
    facts = {"base_fingerprint": model.fingerprint()}
    encoder = PrefixEncoder(prefix_shape(model.config), pre_seq_len=4)
    save_prefix(encoder, folder / "prefix" / "last", meta=PrefixMeta(**facts))
    adapted = tune_adapter(model, LoraSettings(rank=2))
    for name, weight in adapted.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    with writing(folder / "lora" / "last", manifest=facts) as last:
        adapted.save(last)
    return {"prefix_path": folder / "prefix", "adapter_path": folder / "lora"}


def fingerprints() -> list[dict]:
    files = sorted(Path("runs/eval").glob("*/results.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(path.read_text(encoding="utf-8"))["fingerprint"]["model"] for path in files]


def test_what_is_tuned_counts_as_another_model(tuned):
    assert main(["eval", *FEW]) == 0
    for name, folder in tuned.items():
        assert main(["eval", *FEW, f"{name}={folder}"]) == 0
    base, prefix, adapter = fingerprints()
    assert base["weights_hash"] == prefix["weights_hash"] == adapter["weights_hash"]
    assert base["adapter"] == "none"
    assert len({base["adapter"], prefix["adapter"], adapter["adapter"]}) == 3


def test_torchrun_shares_the_questions_and_reports_once(tmp_path):
    assert main(["eval", *FEW, "output_dir=one"]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "glmtune", "eval", *FEW, "output_dir=two"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Written: ") == 1
    one, two = (json.loads(Path(name, "results.json").read_text(encoding="utf-8")) for name in ("one", "two"))
    # How it was run differs, and with it the checksum of the file. That of the answers may: the last digits of
    # log-probabilities depend on the questions that are read together.
    for results in (one, two):
        assert results.pop("environment")["glmtune"]
        assert results.pop("checksum")
        assert results.pop("answers_checksum")
    assert one == two
    counts = [len(Path(f"two/journal-rank{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert abs(counts[0] - counts[1]) <= 1


class Server(BaseHTTPRequestHandler):
    """Lists one model, and answers every chat with the same number."""

    def do_GET(self) -> None:
        self._send({"data": [{"id": "big-model", "max_model_len": 8192}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "Step by step. The answer is 18."}
        self._send(
            {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 9}}
        )

    def _send(self, values: dict) -> None:
        content = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        pass


def test_a_server_answers(capsys):
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        arguments = ["benchmark=gsm8k", "benchmark.data_dir=sample", "benchmark.limit=4", "backend=openai"]
        assert main(["eval", *arguments, f"endpoint.base_url={url}", "output_dir=out"]) == 0
        server.shutdown()
    assert "SAMPLE PARTIAL GSM8K test, few_shot_cot, 8-shot: big-model" in capsys.readouterr().out
    values = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    assert values["num_unparsed"] == 0
    assert values["fingerprint"]["model"]["engine"] == "openai"
    rows = [json.loads(line) for line in Path("out/answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["extracted"]["strict"] for row in rows} == {"18"}


def test_another_strength_is_another_run(tuned):
    said = {"prefix_path": ("prefix_strength", "strength"), "adapter_path": ("adapter_scale", "scale")}
    for name, (setting, word) in said.items():
        for strength in (1, 0.5):
            assert main(["eval", *FEW, f"{name}={tuned[name]}", f"{setting}={strength}"]) == 0
        whole, half = fingerprints()[-2:]
        assert whole["config_hash"] != half["config_hash"], "answers are never mixed"
        assert {**whole, "config_hash": "", "tuned": ""} == {**half, "config_hash": "", "tuned": ""}
        assert half["tuned"] == f"{whole['tuned']} at {word} 0.5"


def test_strength_0_answers_as_the_base(tuned):
    for words in ([], [f"prefix_path={tuned['prefix_path']}", "prefix_strength=0"],
                  [f"adapter_path={tuned['adapter_path']}", "adapter_scale=0"]):  # fmt: skip
        assert (
            main(["eval", *FEW, "benchmark.limit=4", *words, f"output_dir=out{len(words)}{words[-1:]}"]) == 0
        )
    found = [
        [json.loads(line)["choice_logprobs"] for line in sorted(path.read_text("utf-8").splitlines())]
        for path in sorted(Path().glob("out*/*answers*.jsonl"))
    ]
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
