"""lm-evaluation-harness asks our server for the log-probabilities of MMLU's letters, as prompts of token ids."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.mmlu import header, load
from evaluation.sample import LETTERS, Sample
from glmtune.cli import main
from tests.clients.answers import IN_PROCESS, REPO, answers
from tests.clients.conftest import run_python

# transformers, for the tokenizer, is that of the tests, behind everything the other Python has itself.
HARNESS = """
import json, sys
url, tokenizer, folder, packages = sys.argv[1:5]
sys.path.append(packages)
import lm_eval
from lm_eval.tasks import TaskManager
tasks = sys.argv[5:]
done = lm_eval.simple_evaluate(
    model="local-completions",
    model_args=dict(model="glm-tiny", base_url=url + "/v1/completions", tokenizer=tokenizer,
                    tokenizer_backend="huggingface", tokenized_requests=True, add_bos_token=True,
                    max_length=1024, num_concurrent=4, max_retries=1),
    tasks=tasks, num_fewshot=5, task_manager=TaskManager(include_path=folder, include_defaults=False),
    bootstrap_iters=0,
)
found = [[task, sample["doc_id"], [float(said[0]) for said in sample["filtered_resps"]], sample["acc"]]
         for task in tasks for sample in done["samples"][task]]
print(json.dumps(found))
"""
TASK = {
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "fewshot_split": "dev",
    "fewshot_config": {"sampler": "first_n"},
    "doc_to_text": "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
    "doc_to_choice": list(LETTERS),
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def write_task(folder: Path, subject: str) -> str:
    """Write a task of the harness over our sample of a subject; return its name."""
    files = {}
    for split in ("test", "dev"):
        rows = load(REPO / "data" / "mmlu_sample", split, [subject])
        files[split] = str(folder / f"{subject}_{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row_of(row)) + "\n" for row in rows), "utf-8")
    name = f"sample_{subject}"
    task = TASK | {"task": name, "description": header(subject), "dataset_kwargs": {"data_files": files}}
    (folder / f"{name}.yaml").write_text(json.dumps(task), "utf-8")  # JSON is YAML
    return name


def row_of(sample: Sample) -> dict[str, Any]:
    return {
        "question": sample.question,
        "choices": list(sample.choices),
        "answer": LETTERS.index(sample.answer),
    }


def test_log_probabilities_are_those_of_the_engine(
    served_float32: str, clients_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = answers(tmp_path / "here", "mmlu", "is_chat=false", "protocol=few_shot_direct", *IN_PROCESS)
    subjects = sorted({subject for subject, _ in here})
    names = {write_task(tmp_path, subject): subject for subject in subjects}
    # The tokenizer in the form that transformers reads without code of ours.
    assert main(["export", "format=transformers", f"output_dir={tmp_path / 'exported'}"]) == 0
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    places = [str(tmp_path / "exported"), str(tmp_path), sysconfig.get_path("purelib")]
    said = run_python(clients_python, HARNESS, served_float32, *places, *names)
    found = {
        (names[task], index): (scores, acc) for task, index, scores, acc in json.loads(said.splitlines()[-1])
    }
    assert found.keys() == here.keys()
    assert len(found) == 60
    for key, answer in here.items():
        scores, accuracy = found[key]
        assert scores == pytest.approx(answer["choice_logprobs"], abs=1e-3), key
        chosen = LETTERS[scores.index(max(scores))]
        assert chosen == answer["extracted"]["official"], key
        assert accuracy == (chosen == answer["gold"]), key
