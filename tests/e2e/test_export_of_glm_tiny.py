"""An export of glm-tiny in transformers' format gives the numbers of glm-tiny, bit for bit, in every command.

Recipes choose sizes by the name glm-tiny (``by_size``), so both are given the same ones in words.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glmtune.cli import main
from glmtune.loading import load_base, load_model, load_tokenizer
from glmtune.models.load import load_official

BASES = ("glm-tiny", "there")
SMALL = [
    *("retention=null", "trainer.max_steps=3", "trainer.save_steps=3", "trainer.learning_rate=5e-3"),
    *("trainer.per_device_train_batch_size=8", "trainer.gradient_accumulation_steps=1"),
    *("trainer.logging_steps=1", "trainer.warmup_steps=0", "data.max_train_samples=24"),
    *("data.max_eval_samples=8", "data=ads"),
]
RECIPES = {
    "ptuning": ["prefix.pre_seq_len=32", "prefix.prefix_projection=true", "prefix.switch=false"],
    "lora": [],
    "full": [],
}
FILES = {"ptuning": "prefix_encoder", "lora": "adapter_model", "full": "model"}
PATHS = {"ptuning": "prefix_path", "lora": "adapter_path"}
FEW = ["data.max_predict_samples=4", "generation.max_new_tokens=16", "data=ads"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the export in it, as ``there``."""
    folder = tmp_path_factory.mktemp("tiny")
    assert main(["export", "format=transformers", f"output_dir={folder / 'there'}"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))


def of(base: str) -> str:
    return f"model.source={base if base == 'glm-tiny' else Path(base).absolute()}"


@pytest.fixture(scope="module")
def runs(place: Path) -> dict[str, dict[str, Path]]:
    """Method → base → run folder."""
    made: dict[str, dict[str, Path]] = {}
    for method, more in RECIPES.items():
        for base in BASES:
            run = place / f"{method}-{base}"
            source = base if base == "glm-tiny" else place / base
            words = [
                "train",
                f"+recipe={method}",
                f"model.source={source}",
                *SMALL,
                *more,
                f"output_dir={run}",
            ]
            assert main(words) == 0
            made.setdefault(method, {})[base] = run
    return made


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def said(folder: Path) -> list[str]:
    return [row["prediction"] for row in lines(folder / "generated_predictions.jsonl")]


def test_it_is_the_same_base() -> None:
    models = [load_official(base, device="cpu") for base in BASES]
    assert models[0].fingerprint() == models[1].fingerprint()
    assert models[0].family is models[1].family
    tokenizers: list[Any] = [load_tokenizer(base) for base in BASES]
    assert type(tokenizers[0]) is not type(tokenizers[1])
    ids = torch.tensor([tokenizers[0].text_ids("类型#裙*颜色#白，写一段广告。")])
    assert ids.tolist() == [tokenizers[1].text_ids("类型#裙*颜色#白，写一段广告。")]
    for dtype in ("float32", "bfloat16"):
        with torch.no_grad():
            first, second = (load_official(base, device="cpu", dtype=dtype)(ids).logits for base in BASES)
        assert torch.equal(first, second)


@pytest.mark.parametrize("method", list(RECIPES))
def test_training(method: str, runs: dict[str, dict[str, Path]]) -> None:
    tiny, there = (runs[method][base] for base in BASES)
    logs = [
        [(entry["loss"], entry["grad_norm"]) for entry in lines(run / "trainer_log.jsonl") if "loss" in entry]
        for run in (tiny, there)
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 3
    facts = [json.loads((run / "all_results.json").read_text()) for run in (tiny, there)]
    for name in ("base_fingerprint", "baseline_eval_loss", "final_eval_loss"):
        assert facts[0][name] == facts[1][name]
    if method == "full":
        models = [dict(load_official(run / "last", device="cpu").named_parameters()) for run in (tiny, there)]
    else:
        models = [load_file(run / "last" / f"{FILES[method]}.safetensors") for run in (tiny, there)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize("method", list(RECIPES))
def test_predict_and_what_is_tuned_on_one_fits_the_other(
    method: str, runs: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    answers = []
    for tuned_on in BASES:
        for base in BASES if method in PATHS else (tuned_on,):
            run, out = runs[method][tuned_on], tmp_path / f"{tuned_on}-{base}"
            model = (
                [of(base), f"{PATHS[method]}={run}"] if method in PATHS else [f"model.source={run / 'last'}"]
            )
            assert main(["predict", *model, *FEW, f"output_dir={out}"]) == 0
            answers.append(said(out))
    assert all(each == answers[0] for each in answers)
    assert len(answers[0]) == 4


def test_eval_and_compare(runs: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    words = ["benchmark=mmlu", "benchmark.data_dir=sample", "benchmark.limit=1", "protocol=few_shot_direct"]
    for tuned in ("", *PATHS):
        given, facts = [], []
        for base in BASES:
            out = tmp_path / f"{base}-{tuned}"
            more = [f"{PATHS[tuned]}={runs[tuned][base]}"] if tuned else []
            assert main(["eval", of(base), *words, *more, "num_threads=1", f"output_dir={out}"]) == 0
            given.append(lines(out / "answers.jsonl"))
            facts.append(json.loads((out / "results.json").read_text()))
        scored = [[(row["index"], row["completion"], row.get("scores")) for row in each] for each in given]
        assert scored[0] == scored[1]
        assert facts[0]["accuracy_micro"] == facts[1]["accuracy_micro"]
        models = [each["fingerprint"]["model"] for each in facts]
        assert models[0]["weights_hash"] == models[1]["weights_hash"]
    pair = f"runs=[{tmp_path / 'glm-tiny-'},{tmp_path / 'there-'}]"
    main(["compare", pair, "gate.num_resamples=200", f"output_dir={tmp_path / 'verdict'}"])
    verdict = json.loads((tmp_path / "verdict" / "compare.json").read_text())
    (drop,) = [each["verdict"]["drop_pp"] for each in verdict["benchmarks"].values()]
    assert drop == 0


@pytest.mark.parametrize("method", ["int4", "int8", "int4-g32"])
def test_quantize(method: str, tmp_path: Path) -> None:
    for base in BASES:
        out = tmp_path / base
        assert main(["quantize", of(base), f"quantization={method}", f"output_dir={out}"]) == 0
    models = [load_base(tmp_path / base, device="cpu") for base in BASES]
    expected, found = (dict(model.named_parameters()) for model in models)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    asked = {"max_new_tokens": 12, "do_sample": False}
    answers = [
        load_model(tmp_path / base, device="cpu").chat(load_tokenizer(tmp_path / base), "你好", **asked)[0]
        for base in BASES
    ]
    assert answers[0] == answers[1]


def test_chat(
    runs: dict[str, dict[str, Path]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for more in (
        [],
        [f"prefix_path={runs['ptuning']['glm-tiny']}"],
        [f"adapter_path={runs['lora']['there']}"],
    ):
        answers = []
        for base in BASES:
            capsys.readouterr()
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好\n3+5=?\n".encode())))
            assert main(["chat", of(base), "temperature=0", "max_new_tokens=16", *more]) == 0
            answers.append(capsys.readouterr().out)
        assert answers[0] == answers[1]
        assert answers[0].strip()
