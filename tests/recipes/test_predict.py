"""`glmtune predict` on a tiny random base with a random prefix."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from glmtune.cli import main
from glmtune.data.settings import DataSettings
from glmtune.errors import CheckpointError, ConfigError
from glmtune.inference.predict import predict as inference_run
from glmtune.inference.settings import DraftSettings, EngineSettings, GenerationSettings
from glmtune.models.settings import ModelSettings
from recipes.predict import PredictConfig, run
from tests.warm.start import warm_python

SUMMARIES = ("面料柔软，穿着舒服。", "颜色很白。", "小明有3个苹果。", "早点休息。", "今天想去哪里？", "裙子")
OFFICIAL = {
    "model_type": "chatglm", "add_bias_linear": False, "add_qkv_bias": True, "ffn_hidden_size": 48,
    "hidden_size": 32, "kv_channels": 8, "layernorm_epsilon": 1e-5, "multi_query_attention": True,
    "multi_query_group_num": 2, "num_attention_heads": 4, "num_layers": 2, "padded_vocab_size": 0,
    "post_layer_norm": True, "rmsnorm": True, "seq_length": 128, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer_folder, tiny_tokenizer):
    """A random base in the official layout, with large weights so that answers vary."""
    from glmtune.models.checkpoints.config import native_config
    from glmtune.models.checkpoints.writing import save_official
    from glmtune.models.later import OfficialGlmForCausalLM
    from glmtune.models.releases.families import Family

    torch.manual_seed(0)
    size = 64 * -(-tiny_tokenizer.vocab_size // 64)
    config = native_config({**OFFICIAL, "padded_vocab_size": size}, Family.CHATGLM2)
    model = OfficialGlmForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("chatglm2-tiny")
    save_official(model, folder)
    for file in tiny_tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def prefix(tmp_path_factory, base):
    """A run folder whose `last` holds a random prefix of five positions."""
    from glmtune.models.load import load_official
    from glmtune.prefix.checkpoint import PrefixMeta, save_prefix
    from glmtune.prefix.encoder import PrefixEncoder, prefix_shape

    torch.manual_seed(1)
    model = load_official(base)
    encoder = PrefixEncoder(prefix_shape(model.config), pre_seq_len=5)
    folder = tmp_path_factory.mktemp("run")
    save_prefix(encoder, folder / "last", meta=PrefixMeta(base_fingerprint=model.fingerprint()))
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "dev.jsonl"
    rows = [
        {"content": f"类型#裙*颜色#{'白' * (i + 1)}", "summary": text} for i, text in enumerate(SUMMARIES)
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def config(base, data, tmp_path):
    return PredictConfig(
        model=ModelSettings(source=str(base), family="chatglm2", dtype="float32"),
        data=DataSettings(test_file=str(data)),
        generation=GenerationSettings(max_new_tokens=12, batch_size=2),
        output_dir=str(tmp_path / "out"),
    )


def lines(folder):
    return (folder / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()


def test_before_and_after_are_generated_scored_and_compared(config, prefix, tmp_path, capsys):
    result = run(dataclasses.replace(config, prefix_path=str(prefix), compare_base=True, pre_seq_len=5))
    rows = [json.loads(line) for line in lines(tmp_path / "out")]
    assert [row["row"] for row in rows] == list(range(6))
    assert rows[2]["prompt"] == "[Round 1]\n\n问：类型#裙*颜色#白白白\n\n答："
    assert [row["reference"] for row in rows] == list(SUMMARIES)
    assert set(rows[0]["scores"]) >= {"bleu-4", "rouge-1", "exact-match"}
    assert {row["stop_reason"] for row in rows} <= {"eos", "length"}
    before = [json.loads(line)["prediction"] for line in lines(tmp_path / "out" / "base")]
    assert before != [row["prediction"] for row in rows]
    written = json.loads((tmp_path / "out" / "predict_results.json").read_text(encoding="utf-8"))
    assert written["predict_bleu-4"] == written["metrics"]["bleu-4"]["value"]
    assert written["predict_samples"] == 6
    assert result.base is not None
    assert len(result.differences) == 7
    compared = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert compared["differences"][3]["change"] == result.differences[3].change
    shown = capsys.readouterr().out
    assert "before → after: 6 paired rows" in shown
    headings = next(line for line in shown.splitlines() if "prompt" in line)
    assert headings.split() == ["prompt", "before", "after", "reference"]  # side by side
    assert shown.splitlines()[-1].startswith(f"next: glmtune export prefix_path={prefix} ")


def test_prefix_changes_only_its_own_answers(config, prefix, tmp_path):
    alone = run(config)
    both = run(
        dataclasses.replace(
            config, prefix_path=str(prefix), compare_base=True, output_dir=str(tmp_path / "b")
        )
    )
    assert both.base is not None
    assert [row.prediction for row in both.base.predictions] == [
        row.prediction for row in alone.tuned.predictions
    ]


@pytest.mark.parametrize("sampling", [False, True])
def test_a_killed_run_goes_on_and_ends_the_same(config, tmp_path, monkeypatch, sampling):
    if sampling:
        generation = GenerationSettings(do_sample=True, temperature=2.0, max_new_tokens=12, batch_size=2)
        config = dataclasses.replace(config, generation=generation)
    whole = run(dataclasses.replace(config, output_dir=str(tmp_path / "whole"))).tuned
    real, asked = inference_run.generate_completions, []

    def spy(model, tokenizer, prompts, *rest, **keywords):
        asked.append(len(prompts))
        for number, answer in enumerate(real(model, tokenizer, prompts, *rest, **keywords)):
            if len(asked) == 1 and number == 3:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(inference_run, "generate_completions", spy)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    file = tmp_path / "out" / "generated_predictions.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    resumed = run(config).tuned
    assert asked == [6, 4]
    assert resumed.num_resumed == 2
    assert resumed.predictions == whole.predictions
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")
    assert run(config).tuned.num_resumed == 6


# `glmtune predict` that stops for good after its third answer, while it holds the folder.
STUCK = """
import sys, time
from glmtune.cli import main
from glmtune.inference.predict import predict

generate = predict.generate_completions

def stuck(*arguments, **keywords):
    for number, answer in enumerate(generate(*arguments, **keywords)):
        if number == 3:
            print("stuck", flush=True)
            time.sleep(600)
        yield answer

predict.generate_completions = stuck
main(sys.argv[1:])
"""


def test_drafts_change_no_answer_and_what_came_of_them_is_told(tmp_path, capsys):
    rows = [
        {"content": f"类型#裙*颜色#{each}*材质#棉*图案#条纹", "summary": ""}
        for each in ("白色", "黑色", "红色")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    config = PredictConfig(
        model=ModelSettings(source="glm-tiny", dtype="float32"),
        data=DataSettings(test_file=str(path), source_prefix="详细介绍下面的商品：\n"),
        generation=GenerationSettings(max_new_tokens=60, batch_size=1),
        output_dir=str(tmp_path / "plain"),
    )
    plain = run(config).tuned
    assert plain.looked_up.num_draft_tokens == 0
    assert "num_draft_tokens" not in json.loads(
        (tmp_path / "plain" / "predict_results.json").read_text(encoding="utf-8")
    )
    looked_up = dataclasses.replace(config.generation, prompt_lookup_tokens=7)
    by_model = DraftSettings(source="glm-tiny", quantization="int4")
    for changes in ({"generation": looked_up}, {"draft": by_model}):
        folder = tmp_path / next(iter(changes))
        found = run(dataclasses.replace(config, output_dir=str(folder), **changes)).tuned
        assert [row.prediction for row in found.predictions] == [row.prediction for row in plain.predictions]
        told = found.looked_up
        assert told.num_draft_tokens >= told.num_accepted_tokens > 0
        written = json.loads((folder / "predict_results.json").read_text(encoding="utf-8"))
        assert written["num_accepted_tokens"] == told.num_accepted_tokens
        assert written["num_new_tokens"] == sum(row.num_new_tokens for row in found.predictions)
        line = f"drafts: {told.num_accepted_tokens} of {told.num_draft_tokens} drafted tokens were right"
        assert line in capsys.readouterr().out


def test_drafts_are_refused_for_beams_and_beyond_their_length():
    with pytest.raises(ConfigError, match=r"`draft.source` is `glm-tiny`, but beams take none"):
        PredictConfig(draft=DraftSettings(source="glm-tiny"), generation=GenerationSettings(num_beams=2))
    with pytest.raises(
        ConfigError, match=r"`generation.prompt_lookup_tokens` is 7, but beams take no drafts"
    ):
        GenerationSettings(prompt_lookup_tokens=7, num_beams=2)
    for settings, name in ((GenerationSettings, "generation"), (EngineSettings, "engine")):
        with pytest.raises(ConfigError, match=rf"`{name}.prompt_lookup_tokens` is 33.*32"):
            settings(prompt_lookup_tokens=33)


def test_a_second_process_is_refused_and_goes_on_when_the_first_is_killed(config, base, data, tmp_path):
    whole = run(dataclasses.replace(config, output_dir=str(tmp_path / "whole"))).tuned
    command = [
        "predict", f"model.source={base}", "model.family=chatglm2", "model.dtype=float32", "data=files",
        f"data.test_file={data}", "generation.max_new_tokens=12", "generation.batch_size=2",
        f"output_dir={tmp_path / 'out'}",
    ]  # fmt: skip

    with subprocess.Popen(
        [sys.executable, "-c", STUCK, *command], stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert any(line == "stuck\n" for line in first.stdout)
        before = lines(tmp_path / "out")
        assert len(before) == 3
        words = f"is being written by another process (process {first.pid} on {socket.gethostname()}, since"
        second = subprocess.run(
            [*warm_python(), "-m", "glmtune", *command], capture_output=True, text=True, check=False
        )
        assert second.returncode == 2
        assert words in " ".join(second.stderr.split())
        with pytest.raises(ConfigError, match=re.escape(words)):
            run(dataclasses.replace(config, resume="never"))
        assert lines(tmp_path / "out") == before
        first.kill()
    done = run(config).tuned
    assert done.num_resumed == 3
    assert done.predictions == whole.predictions
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")


def test_rows_made_otherwise_are_refused(config, prefix):
    run(config)
    with pytest.raises(ConfigError, match=r"6 rows of another run \(prefix_sha256.*resume=never"):
        run(dataclasses.replace(config, prefix_path=str(prefix)))
    with pytest.raises(ConfigError, match=r"max_new_tokens.: 12.* there, .*max_new_tokens.: 9"):
        run(dataclasses.replace(config, generation=GenerationSettings(max_new_tokens=9)))
    longer = dataclasses.replace(config, generation=GenerationSettings(max_new_tokens=9), resume="never")
    assert run(longer).tuned.num_resumed == 0


def test_answers_go_beside_the_prefix_by_default(config, prefix):
    result = run(
        dataclasses.replace(config, prefix_path=str(prefix / "last"), output_dir=None, resume="never")
    )
    assert result.tuned.folder == prefix / "predict"


def test_questions_without_answers_are_answered_but_not_scored(config, tmp_path, capsys):
    path = tmp_path / "ask.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "你好"}]}), encoding="utf-8")
    result = run(dataclasses.replace(config, data=DataSettings(test_file=str(path))))
    assert result.tuned.report is None
    assert "nothing is scored" in capsys.readouterr().out
    assert json.loads(lines(tmp_path / "out")[0])["reference"] is None


def test_command_line(base, data, prefix, tmp_path, capsys):
    arguments = [f"model.source={base}", "model.family=chatglm2", "data=files", f"data.test_file={data}"]
    arguments += [f"prefix_path={prefix}", f"output_dir={tmp_path / 'cli'}", "data.max_target_length=8"]
    assert main(["predict", *arguments, "generation.batch_size=3"]) == 0
    assert "adgen-official" in capsys.readouterr().out
    made = json.loads((tmp_path / "cli" / "predict_config.json").read_text(encoding="utf-8"))
    assert made["generation"]["max_new_tokens"] == 8
    assert made["pre_seq_len"] == 5


def test_another_length_or_base_is_refused(config, prefix, base, tmp_path):
    with pytest.raises(ConfigError, match=r"`pre_seq_len` is 128, but the prefix .* has length 5"):
        run(dataclasses.replace(config, prefix_path=str(prefix), pre_seq_len=128))
    with pytest.raises(CheckpointError, match="No prefix at"):
        run(dataclasses.replace(config, prefix_path=str(tmp_path / "nothing")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compare_base": True}, r"`compare_base` is True, but no prefix is given"),
        ({"pre_seq_len": 128}, r"`pre_seq_len` is 128, but no prefix is given"),
        ({"prefix_strength": 0.5}, r"`prefix_strength` is 0.5, but no prefix is given.*`prefix_path=RUN`"),
        ({"adapter_scale": 2.0}, r"`adapter_scale` is 2.0, but no adapter is given.*`adapter_path=RUN`"),
        ({"adapter_path": "a", "adapter_scale": -1.0}, r"`adapter_scale` is -1.0, but .* from 0"),
        ({"split": "dev"}, r"`split` is `dev`"),
        ({"resume": "yes"}, r"`resume` is `yes`"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        PredictConfig(**values)


@pytest.fixture
def adapter(base, tmp_path):
    """A run folder whose `last` holds a random LoRA adapter of that base, as training leaves it."""
    from glmtune.models.load import load_official
    from glmtune.training.adapt import tune_adapter
    from glmtune.training.checkpoints.folder import writing
    from glmtune.training.settings import LoraSettings

    torch.manual_seed(2)
    model = load_official(base)
    facts = {"base_fingerprint": model.fingerprint()}
    tuned = tune_adapter(model, LoraSettings(rank=4))
    for name, weight in tuned.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    with writing(tmp_path / "lora" / "last", manifest=facts) as folder:
        tuned.save(folder)
    return tmp_path / "lora"


def test_an_adapter_answers_for_itself_and_leaves_the_base_alone(config, adapter, tmp_path):
    plain = run(config).tuned
    both = dataclasses.replace(config, adapter_path=str(adapter), compare_base=True, output_dir=None)
    result = run(both)
    assert result.tuned.folder == adapter / "predict"
    assert result.base is not None
    assert [row.prediction for row in result.base.predictions] == [
        row.prediction for row in plain.predictions
    ]
    assert [row.prediction for row in result.tuned.predictions] != [
        row.prediction for row in plain.predictions
    ]
    made = json.loads((adapter / "predict" / "predict_config.json").read_text(encoding="utf-8"))
    assert (made["adapter"], len(made["adapter_sha256"])) == (str(adapter / "last"), 64)
    assert (
        json.loads((adapter / "predict" / "base" / "predict_config.json").read_text())["adapter_sha256"] == ""
    )
    with pytest.raises(ConfigError, match=r"6 rows of another run \(adapter_sha256"):
        run(dataclasses.replace(config, adapter_path=str(adapter), output_dir=str(tmp_path / "out")))
    with pytest.raises(ConfigError, match=r"`prefix_path` and `adapter_path` are both set"):
        dataclasses.replace(both, prefix_path="somewhere")
    with pytest.raises(CheckpointError, match="No adapter at"):
        run(dataclasses.replace(config, adapter_path=str(tmp_path / "nothing")))


def answers(split):
    return [row.prediction for row in split.predictions]


def test_a_strength_is_another_run_beside_the_others(config, prefix, tmp_path, capsys):
    plain = run(config).tuned
    whole = dataclasses.replace(config, prefix_path=str(prefix), output_dir=None, resume="never")
    half = dataclasses.replace(whole, prefix_strength=0.5)
    found = {each.prefix_strength: run(each).tuned for each in (whole, half)}
    assert "(5 tokens) at strength 0.5" in capsys.readouterr().out
    assert found[0.5].folder == prefix / "predict-strength-0.5"
    made = json.loads((found[0.5].folder / "predict_config.json").read_text(encoding="utf-8"))
    assert made["prefix_strength"] == 0.5
    nothing = run(dataclasses.replace(whole, prefix_strength=0.0, compare_base=True))
    assert answers(nothing.tuned) == answers(plain) == answers(nothing.base)
    assert len({str(answers(split)) for split in (plain, *found.values())}) == 3
    mixed = dataclasses.replace(half, output_dir=str(found[1.0].folder), resume="auto")
    with pytest.raises(ConfigError, match=r"6 rows of another run \(prefix_strength: 1.0 there, 0.5 now"):
        run(mixed)


def test_a_scale_is_another_run_and_what_next_says_it(config, adapter, tmp_path, capsys):
    plain = run(config).tuned
    whole = dataclasses.replace(config, adapter_path=str(adapter), output_dir=None)
    scaled = run(dataclasses.replace(whole, adapter_scale=0.5)).tuned
    said = capsys.readouterr().out
    assert f"adapter {adapter / 'last'} at scale 0.5" in said
    assert "adapter_scale=0.5" in said.splitlines()[-1]
    assert scaled.folder == adapter / "predict-scale-0.5"
    none = run(dataclasses.replace(whole, adapter_scale=0.0)).tuned
    assert answers(none) == answers(plain)
    assert len({str(answers(split)) for split in (plain, scaled, run(whole).tuned)}) == 3
