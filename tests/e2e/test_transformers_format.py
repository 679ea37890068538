"""Every kind of folder in transformers' format x every command: through the real recipes, a few steps each."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from glmtune.cli import main
from glmtune.loading import load_base, load_model, load_tokenizer
from glmtune.models.load import load_official
from glmtune.quantization.files.write import REPORT_FILE
from glmtune.quantization.layers.linear import QuantizedLinear
from tests.conftest import slow_except
from tests.e2e.stories import run_sessions
from tests.e2e.test_generations import FILES, settings, tuned_model
from tests.models.transformers_folders import KINDS, make_folder

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
}
SOME = ("glm-edge", "glm4")
"""In every run of the tests: both architectures, one of them with a tied head."""
EACH_KIND = slow_except(SOME, list(KINDS))
METHODS = ("prefix", "lora", "full")
PATHS = {"prefix": "prefix_path", "lora": "adapter_path"}
MakeKind = Callable[..., Path]


@pytest.fixture(scope="session")
def make_kind(tmp_path_factory: pytest.TempPathFactory) -> MakeKind:
    """Make (once) a folder of a kind; return it."""
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, dtype: str = "float32") -> Path:
        if (kind, dtype) not in made:
            folder = tmp_path_factory.mktemp("kinds") / kind
            made[kind, dtype] = make_folder(folder, kind, dtype=dtype, **SIZES)
        return made[kind, dtype]

    return make


@pytest.fixture(scope="session")
def trained(make_kind: MakeKind, question_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train (once) a kind with a method for two steps; return the run folder."""
    runs: dict[tuple[str, str], Path] = {}

    def train(kind: str, method: str) -> Path:
        if (kind, method) not in runs:
            run = tmp_path_factory.mktemp("runs") / f"{kind}-{method}"
            assert main(["train", *settings(make_kind(kind), question_rows, method, run)]) == 0
            runs[kind, method] = run
        return runs[kind, method]

    return train


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "all_results.json").read_text())


def predictions(folder: Path) -> list[str]:
    file = folder / "generated_predictions.jsonl"
    return [json.loads(line)["prediction"] for line in file.read_text().splitlines()]


def rows_words(rows: Path) -> list[str]:
    words = ["data=files", f"data.test_file={rows}", "data.prompt_column=prompt"]
    return [*words, "data.response_column=response", "generation.max_new_tokens=6", "model.device=cpu"]


def inputs_of(folder: Path) -> Any:
    return load_tokenizer(folder)(["Which fruit?", "还剩几个苹果？"], padding=True, return_tensors="pt")


# ---- training ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_training_leaves_what_loads_and_answers_otherwise(
    kind: str, method: str, make_kind: MakeKind, trained: Any
) -> None:
    base, run = make_kind(kind), trained(kind, method)
    found, before = results(run), load_official(base, device="cpu")
    assert math.isfinite(found["final_eval_loss"])
    assert found["final_eval_loss"] != found["baseline_eval_loss"]
    assert found["base_fingerprint"] == before.fingerprint()
    assert (run / "last" / FILES[method]).is_file()
    inputs, tuned = inputs_of(base), tuned_model(base, run / "last", method)
    with torch.no_grad():
        real = inputs["attention_mask"].bool()
        logits = tuned(**inputs).logits[real]
        assert torch.isfinite(logits).all()
        assert not torch.equal(logits, before(**inputs).logits[real])


@pytest.mark.parametrize("kind", EACH_KIND)
def test_full_tuning_writes_a_folder_that_transformers_loads(
    kind: str, make_kind: MakeKind, trained: Any
) -> None:
    base, last = make_kind(kind), trained(kind, "full") / "last"
    inputs = inputs_of(base)
    plain, problems = AutoModelForCausalLM.from_pretrained(last, output_loading_info=True)
    assert not any(problems.values()), problems
    with torch.no_grad():
        found, expected = plain(**inputs).logits, load_model(last, device="cpu")(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    released = json.loads((base / "config.json").read_text())
    written = json.loads((last / "config.json").read_text())
    different = {name for name, value in released.items() if written.get(name) != value}
    assert different <= {"transformers_version", "dtype", "use_cache"}
    assert load_file(last / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    turns = [{"role": "user", "content": "Which fruit?"}]
    texts = [
        AutoTokenizer.from_pretrained(place).apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        for place in (base, last)
    ]
    assert texts[0] == texts[1]
    stops = [plain.generation_config.eos_token_id, load_official(base).generation_config.eos_token_id]
    assert stops[0] == stops[1] != []


@pytest.mark.parametrize(
    ("kind", "method"), [("glm", "prefix"), ("glm4", "lora"), ("glm-edge", "full"), ("glm-z1", "full")]
)
def test_going_on_equals_not_stopping(
    kind: str, method: str, make_kind: MakeKind, question_rows: Path, trained: Any, tmp_path: Path
) -> None:
    calm = {"prefix": ["prefix.dropout=0"], "lora": ["lora.dropout=0"], "full": []}[method]
    words = settings(make_kind(kind), question_rows, method, tmp_path / "whole", *calm)
    assert main(["train", *words, "trainer.max_steps=4"]) == 0
    again = settings(make_kind(kind), question_rows, method, tmp_path / "again", *calm)
    checkpoint = f"resume={tmp_path / 'whole' / 'checkpoint-2'}"
    assert main(["train", *again, "trainer.max_steps=4", checkpoint]) == 0
    expected, found = (load_file(tmp_path / run / "last" / FILES[method]) for run in ("whole", "again"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("kind", EACH_KIND)
def test_packed_rows_give_the_loss_of_single_ones(
    kind: str, make_kind: MakeKind, question_rows: Path, tmp_path: Path
) -> None:
    losses = []
    for packing in ("false", "true"):
        words = settings(make_kind(kind), question_rows, "prefix", tmp_path / packing, "prefix.dropout=0")
        words += [f"data.packing={packing}", "trainer.max_steps=1", "trainer.per_device_train_batch_size=4"]
        assert main(["train", *words]) == 0
        losses.append(results(tmp_path / packing)["baseline_eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("division", ["deepspeed=zero3", "distributed=fsdp"])
def test_two_processes_that_read_their_parts_equal_one(
    division: str, make_kind: MakeKind, question_rows: Path, tmp_path: Path
) -> None:
    if division.startswith("deepspeed"):
        pytest.importorskip("deepspeed", reason="the extra glmtune[deepspeed] is not installed")
    plan: list[dict[str, Any]] = []
    cells = [(kind, method) for kind in ("glm-edge", "glm4") for method in METHODS]
    for kind, method in cells:
        calm = {"prefix": ["prefix.dropout=0"], "lora": ["lora.dropout=0"], "full": []}[method]
        for count, batch, more in ((1, 4, []), (2, 2, [division])):
            name = f"{kind}-{method}-{count}"
            words = settings(make_kind(kind), question_rows, method, Path(name), *calm, *more)
            words = [word for word in words if "gradient_checkpointing" not in word]
            words += [f"trainer.per_device_train_batch_size={batch}", "trainer.report_to=[]"]
            words.append("trainer.max_steps=3")
            plan.append({"name": name, "count": count, "overrides": words})
        resumed = [*words, f"resume={kind}-{method}-2/checkpoint-2"]
        resumed = [word for word in resumed if not word.startswith("output_dir")]
        again = {"name": f"{kind}-{method}-again", "count": 2}
        plan.append(again | {"overrides": [*resumed, f"output_dir={kind}-{method}-again"]})
    story = run_sessions(tmp_path, plan)
    for kind, method in cells:
        one, two, again = (f"{kind}-{method}-{part}" for part in (1, 2, "again"))
        for name in (one, two, again):
            assert set(story.codes(name)) == {0}, story.said(name, 0)[-3000:]
        assert story.losses(two) == pytest.approx(story.losses(one), rel=1e-4)
        assert story.losses(again) == story.losses(two)[2:]
        mine, theirs = story.weights(one), story.weights(two)
        assert mine.keys() == theirs.keys()
        loaded = tuned_model(make_kind(kind), tmp_path / two / "last", method)
        assert torch.isfinite(loaded(**inputs_of(make_kind(kind))).logits).any()


# ---- codes ----


@pytest.mark.parametrize("method", ["int4", "int8", "int4-g32", "int4-gptq"])
@pytest.mark.parametrize("kind", EACH_KIND)
def test_quantizing(
    kind: str, method: str, make_kind: MakeKind, question_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, rows = make_kind(kind), f"data.train_file={question_rows}"
    columns = ["data=files", rows, "data.prompt_column=prompt", "data.response_column=response"]
    words = ["quantize", f"model.source={base}", f"quantization={method}", "output_dir=out", *columns]
    assert main(words) == 0
    assert "glmtune's own format" in capsys.readouterr().out
    report = json.loads(Path("out", REPORT_FILE).read_text())
    replaced = [layer["name"] for layer in report["layers"] if layer["replaced"]]
    assert len(replaced) == 2 * 6
    assert all(name.startswith("model.layers.") for name in replaced)
    stored = load_base("out", device="cpu")
    inputs = inputs_of(base)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = stored(**inputs).logits[real]
        fast = load_model("out", device="cpu")
        layers = [module for module in fast.modules() if isinstance(module, QuantizedLinear)]
        assert len(layers) == 2 * 6
        torch.testing.assert_close(fast(**inputs).logits[real], expected, atol=5e-3, rtol=5e-3)
    assert stored.is_base(load_official(base).fingerprint())
    assert load_tokenizer("out").get_vocab() == load_tokenizer(base).get_vocab()
    if not method.endswith("gptq"):
        made = load_base(base, device="cpu", quantization=method)
        codes = dict(stored.named_parameters(remove_duplicate=False))
        for name, weight in made.named_parameters(remove_duplicate=False):
            assert torch.equal(weight, codes[name]), name
        assert made.fingerprint() == stored.fingerprint()
    if method in ("int4", "int8"):
        model = load_model(base, device="cpu").quantize(int(method[-1]))
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits[real], expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("kind", EACH_KIND)
def test_the_compiled_kernels_take_every_layer_and_the_gate(kind: str, make_kind: MakeKind) -> None:
    from glmtune.quantization.kernels.gated_mlp import GATED
    from glmtune.quantization.kernels.native import native_library

    if native_library().refusal:
        pytest.skip(f"no native kernels: {native_library().refusal}")
    model = load_model(make_kind(kind), device="cpu", quantization="int4-g32")
    kinds = {type(layer.mlp) for layer in model.model.layers}
    assert kinds <= set(GATED.values())


def test_layers_can_be_left_out_and_other_tools_are_told(make_kind: MakeKind) -> None:
    words = ["quantize", f"model.source={make_kind('glm4')}", "quantization=int4", "output_dir=out"]
    assert main([*words, "quantization.skip=[down_proj, '*.layers.0.*']"]) == 0
    report = json.loads(Path("out", REPORT_FILE).read_text())
    replaced = [layer["name"] for layer in report["layers"] if layer["replaced"]]
    assert len(replaced) == 5
    assert load_model("out", device="cpu").quantization == "int4"
    for method in ("int4", "int8"):
        again = ["quantize", f"model.source={make_kind('glm4')}", f"quantization={method}"]
        assert main([*again, f"output_dir={method}"]) == 0
        with pytest.raises(ValueError, match="has no `quant_method`"):
            AutoModelForCausalLM.from_pretrained(method)
    assert main([*words[:-1], "output_dir=again", "quantization.skip=[dense]"]) == 2


@pytest.mark.parametrize("kind", EACH_KIND)
def test_tuning_over_codes(kind: str, make_kind: MakeKind, question_rows: Path, tmp_path: Path) -> None:
    for method in ("prefix", "lora"):
        words = settings(make_kind(kind), question_rows, method, tmp_path / method, "quantization=int8")
        assert main(["train", *words]) == 0
        answer = [
            "predict",
            f"model.source={make_kind(kind)}",
            "quantization=int8",
            *rows_words(question_rows),
        ]
        assert main([*answer, f"{PATHS[method]}={tmp_path / method}"]) == 0
        assert len(predictions(tmp_path / method / "predict")) == 4


# ---- answers ----


@pytest.mark.parametrize("kind", EACH_KIND)
def test_predict(kind: str, make_kind: MakeKind, question_rows: Path, trained: Any, tmp_path: Path) -> None:
    for method in PATHS:
        words = ["predict", f"model.source={make_kind(kind)}", f"{PATHS[method]}={trained(kind, method)}"]
        for size in (1, 4):
            more = [f"generation.batch_size={size}", f"output_dir={method}-{size}"]
            assert main([*words, *rows_words(question_rows), *more]) == 0
        assert predictions(tmp_path / f"{method}-1") == predictions(tmp_path / f"{method}-4")
    assert (
        main(
            [
                "predict",
                f"model.source={trained(kind, 'full') / 'last'}",
                *rows_words(question_rows),
                "output_dir=f",
            ]
        )
        == 0
    )
    assert len(predictions(tmp_path / "f")) == 4


@pytest.mark.parametrize("kind", EACH_KIND)
def test_eval(kind: str, make_kind: MakeKind, trained: Any, tmp_path: Path) -> None:
    words = ["eval", f"model.source={make_kind(kind)}", "benchmark=mmlu", "benchmark.data_dir=sample"]
    words += ["benchmark.limit=1", "protocol=few_shot_direct", "num_threads=1", "benchmark.num_fewshot=1"]
    seen = set()
    for name, more in {
        "base": [],
        "prefix": [f"prefix_path={trained(kind, 'prefix')}"],
        "lora": [f"adapter_path={trained(kind, 'lora')}"],
        "codes": ["quantization=int4"],
    }.items():
        assert main([*words, *more, f"output_dir={name}"]) == 0
        values = json.loads((tmp_path / name / "results.json").read_text())
        assert values["num_samples"] > 0
        seen.add(json.dumps(values["fingerprint"]["model"], sort_keys=True))
    assert len(seen) == 4


@pytest.mark.parametrize("kind", EACH_KIND)
def test_chat(
    kind: str,
    make_kind: MakeKind,
    trained: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [
        "chat",
        f"model.source={make_kind(kind)}",
        "temperature=0",
        "max_new_tokens=8",
        "model.device=cpu",
    ]
    answers = []
    for more in ([], [f"prefix_path={trained(kind, 'prefix')}"], [f"adapter_path={trained(kind, 'lora')}"]):
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Which fruit?\n你好\n".encode())))
        assert main([*words, *more]) == 0
        answers.append(capsys.readouterr().out)
    assert all(answers)
    model, tokenizer = load_model(make_kind(kind), device="cpu"), load_tokenizer(make_kind(kind))
    response, history = model.chat(tokenizer, "Which fruit?", max_new_tokens=8, do_sample=False)
    assert isinstance(response, str)
    assert len(model.chat(tokenizer, "你好", history=history, max_new_tokens=8, do_sample=False)[1]) > len(
        history
    )


# ---- placement ----


@pytest.mark.parametrize("kind", EACH_KIND)
def test_a_model_split_by_layers_computes_the_same(kind: str, make_kind: MakeKind, trained: Any) -> None:
    ends = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb"), "cpu:0")
    places = ends | {"model.layers.0": "cpu:0", "model.layers.1": "cpu:1"}  # one device under two names
    inputs = inputs_of(make_kind(kind))
    for options in ({}, {"quantization": "int8"}, {"prefix": trained(kind, "prefix")}):
        whole = load_model(make_kind(kind), device="cpu", **options)
        split = load_model(make_kind(kind), device_map=places, **options)
        assert split.hf_device_map["model.layers.1"] == "cpu:1"
        with torch.no_grad():
            torch.testing.assert_close(split(**inputs).logits, whole(**inputs).logits, rtol=0, atol=0)
