"""What llama.cpp itself makes of our GGUF files: ids, logits, greedy text, perplexity, chat, ends of answers."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from glmtune.export.export import export
from glmtune.export.gguf.folder import MODELFILE
from glmtune.export.gguf.reading import read_gguf
from glmtune.export.source import ExportJob
from glmtune.loading import load_tokenizer
from glmtune.messages import Message
from glmtune.models.checkpoints.config import native_config
from glmtune.models.load import build_model, load_official
from glmtune.models.releases.families import Family
from glmtune.models.templates.renderer import template_for
from glmtune.models.tokenizers.load import load_tokenizer_folder
from glmtune.tiny.corpus.ads import ads
from tests.e2e.conftest import MakeBase, official_config
from tests.export.go_template import render_go
from tests.export.test_gguf_modelfile import quoted
from tests.models.transformers_folders import make_folder

WAY = "is not installed: pip install 'glmtune[gguf]' llama-cpp-python (which compiles llama.cpp)"
pytest.importorskip("gguf", reason=f"the `gguf` package {WAY}")
llama_cpp = pytest.importorskip("llama_cpp", reason=f"llama-cpp-python {WAY}")

REPO = Path(__file__).resolve().parents[2]
TEXTS = (
    "你好，今天想去哪里？这条裙子颜色很白。",
    "  Two blanks,\ttabs\n\nand line  breaks; naïve café №7 😀👍🏽",
    "def f(x):\n    return x ** 2  # 12345 + 0.678",
    "Don't we've I'LL 1234567 ４５６ 10,000",
    " \n \n\n  x ",
    "sop eop [gMASK] philosophers",
    "▁▁ é́ \u200b \ufeff ﷺ",
    "",
)
TALKS = (
    [("user", "你好")],
    [
        ("system", "Answer in one word."),
        ("user", "Which colour?"),
        ("assistant", "White."),
        ("user", "3 + 4 = ?\n"),
    ],
    [
        ("user", "  a  "),
        ("assistant", "b\n\nc"),
        ("user", "写一段广告。"),
        ("assistant", "好"),
        ("user", "Why?"),
    ],
)


EXACT_CACHE = {"type_k": 0, "type_v": 0}
"""Keys and values in float32: random models have many tokens nearly as likely as the first."""


def job(source: Path | str, folder: Path, kind: str = "F16", family: str | None = None) -> ExportJob:
    return ExportJob(
        str(source), "gguf", folder, family, None, None, None, 2**30, False, gguf_type=kind
    )  # fmt: skip


def only_file(folder: Path) -> Path:
    (file,) = folder.glob("*.gguf")
    return file


def llama(folder: Path, **settings: Any) -> Any:
    usual = {"n_ctx": 512, "logits_all": True, "verbose": False, "n_threads": 1, "n_gpu_layers": 0}
    return llama_cpp.Llama(str(only_file(folder)), **(usual | settings))


def logits(model: Any, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    model.reset()
    model.eval(list(ids))
    return np.array(model.scores[: len(ids)])


def greedy(model: Any, ids: Sequence[int], count: int = 24) -> list[int]:
    """The highest logit's token, again and again; ends of answers are tokens like others."""
    model.reset()
    model.eval(list(ids))
    found: list[int] = []
    for _ in range(count):
        found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(found[-1:])
    return found


def ours(model: Any, ids: Sequence[int], count: int = 24) -> list[int]:
    known, found = list(ids), list[int]()
    with torch.no_grad():
        for _ in range(count):
            found.append(int(model(input_ids=torch.tensor([known])).logits[0, -1].argmax()))
            known.append(found[-1])
    return found


def messages(talk: Sequence[tuple[str, str]]) -> list[Message]:
    return [Message(role, content) for role, content in talk]  # pyright: ignore[reportArgumentType]


def rendered(model: Any, talk: Sequence[tuple[str, str]]) -> str:
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
        template=model.metadata["tokenizer.chat_template"], eos_token="", bos_token=""
    )
    return formatter(messages=[{"role": role, "content": content} for role, content in talk]).prompt


def check_ids(model: Any, tokenizer: Any) -> None:
    """Ids of texts, and of prompts as llama.cpp and Ollama render them, are ours."""
    for text in TEXTS:
        found = model.tokenize(text.encode(), add_bos=False, special=False)
        assert found == tokenizer.text_ids(text), text
    for name in set(tokenizer.command_names) - {"[MASK]", "[sMASK]", "eop", "<eop>"}:  # in no prompt
        shown = {"sop": "<sop>", "eop": "<eop>"}.get(name, name)
        assert model.tokenize(shown.encode(), add_bos=False, special=True) == [tokenizer.get_command(name)]
    template = template_for(tokenizer)
    go = quoted((Path(model.model_path).parent / MODELFILE).read_text(encoding="utf-8"))
    for talk in TALKS:
        expected = template.encode_prompt(tokenizer, messages(talk))
        strips = "strip()" in model.metadata["tokenizer.chat_template"]  # which Ollama's cannot
        go_text = render_go(go, [(role, text.strip() if strips else text) for role, text in talk])
        for text in (rendered(model, talk), go_text):
            assert model.tokenize(text.encode(), add_bos=True, special=True) == expected, text


def check_ends(model: Any, tokenizer: Any) -> None:
    vocabulary = llama_cpp.llama_model_get_vocab(model._model.model)
    ends = [i for i in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, i)]
    assert ends == sorted(template_for(tokenizer).stop_ids(tokenizer))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Export glm-tiny (once) as a type; return the folder."""

    @cache
    def made(kind: str) -> Path:
        return export(job("glm-tiny", tmp_path_factory.mktemp("tiny") / kind, kind)).folder

    return made


def test_glm_tiny_answers_as_in_glmtune(tiny: Callable[[str], Path]) -> None:
    model, source = llama(tiny("F16")), load_official("glm-tiny", dtype="float32")
    tokenizer = load_tokenizer("glm-tiny")
    check_ids(model, tokenizer)
    check_ends(model, tokenizer)
    for talk in (*TALKS, [("user", "How many legs does a cat have?")], [("user", "类型#裙*颜色#白")]):
        ids = template_for(tokenizer).encode_prompt(tokenizer, messages(talk))
        expected = source(input_ids=torch.tensor([ids])).logits[0].detach().numpy()
        found = logits(model, ids)
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
        assert greedy(model, ids) == ours(source, ids)


def test_glm_tiny_chats(tiny: Callable[[str], Path]) -> None:
    """The way of users: messages in, text out, ended where the release ends."""
    model, source = llama(tiny("F16")), load_official("glm-tiny", dtype="float32")
    tokenizer = load_tokenizer("glm-tiny")
    history: list[dict[str, str]] = []
    talked: list[Any] = []
    for question in ("How many legs does a cat have?", "你好", "3 + 4 = ?"):
        history.append({"role": "user", "content": question})
        reply = model.create_chat_completion(messages=history, temperature=0.0, max_tokens=96)
        choice = reply["choices"][0]
        expected, talked = source.chat(tokenizer, question, history=talked, do_sample=False)
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"].strip() == expected
        history.append({"role": "assistant", "content": expected})


def test_perplexity_of_rounded_files(tiny: Callable[[str], Path]) -> None:
    """Of advertisements of the kind that glm-tiny writes; printed for docs/export.md."""
    tokenizer = load_tokenizer("glm-tiny")
    template = template_for(tokenizer)
    samples = [ads(Random(seed)) for seed in range(2_000_000, 2_000_012)]
    prompts = [template.encode_prompt(tokenizer, each.messages[:-1]) for each in samples]
    answers = [template.encode_answer(tokenizer, each.messages[-1]) for each in samples]

    def perplexity(scores: Callable[[list[int]], Any]) -> float:
        total, count = 0.0, 0
        for prompt, answer in zip(prompts, answers, strict=True):
            found = torch.as_tensor(scores([*prompt, *answer]))[len(prompt) - 1 : -1].double()
            total -= float(found.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].sum())
            count += len(answer)
        return float(np.exp(total / count))

    source = load_official("glm-tiny", dtype="float32")
    with torch.no_grad():
        exact = perplexity(lambda ids: source(input_ids=torch.tensor([ids])).logits[0])
    print(f"glmtune {exact:.4f}")
    limits = {"F32": 1e-4, "F16": 1e-3, "BF16": 2e-3, "Q8_0": 2e-3, "Q4_K_M": 0.01, "Q4_0": 0.05}
    for kind, limit in limits.items():
        model = llama(tiny(kind))
        found = perplexity(lambda ids, model=model: logits(model, ids))
        print(f"{kind} {found:.4f} {only_file(tiny(kind)).stat().st_size / 2**20:.2f} MiB")
        assert abs(found / exact - 1) < limit, kind


@pytest.mark.parametrize("kind", ["glm", "glm-edge", "glm4", "glm-z1"])
def test_folders_in_transformers_format(kind: str, tmp_path: Path) -> None:
    sizes = {} if kind in ("glm4", "glm-z1") else {"head_dim": 8}
    folder = make_folder(tmp_path / "in", kind, initializer_range=0.3, **sizes)
    export(job(folder, tmp_path / "out", "F32"))
    check(llama(tmp_path / "out", **EXACT_CACHE), load_official(folder), load_tokenizer(folder))


def test_yarn(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5} | yarn
    folder = make_folder(tmp_path / "in", "glm4", initializer_range=0.3, rope_parameters=rope)
    export(job(folder, tmp_path / "out", "F32"))
    check(llama(tmp_path / "out", **EXACT_CACHE), load_official(folder), load_tokenizer(folder))


@pytest.mark.parametrize(
    "family",
    [Family.CHATGLM2, Family.CHATGLM2_32K, Family.CHATGLM3, Family.CHATGLM3_32K, Family.GLM4],
)
def test_official_checkpoints(family: Family, make_base: MakeBase, tmp_path: Path) -> None:
    source = make_base(family, "float32")
    export(job(source, tmp_path / "out", "F32"))
    check(llama(tmp_path / "out", **EXACT_CACHE), load_official(source), load_tokenizer(source))


def check(model: Any, source: Any, tokenizer: Any) -> None:
    """Ids, ends, logits at every position of a long row, and greedy tokens."""
    check_ids(model, tokenizer)
    check_ends(model, tokenizer)
    ids = [
        *tokenizer.prefix_ids,
        *torch.randint(5, 250, (200,), generator=torch.Generator().manual_seed(0)).tolist(),
    ]
    expected = source.float()(input_ids=torch.tensor([ids])).logits[0].detach().numpy()
    assert np.abs(logits(model, ids) - expected).max() < 1e-4 * np.abs(expected).max()
    assert greedy(model, ids) == ours(source, ids)


PROGRAM = shutil.which("llama-completion")
KINDS = ("glm-tiny", Family.CHATGLM2, Family.CHATGLM3, Family.GLM4, "glm", "glm-edge", "glm4", "glm-z1")


@pytest.mark.skipif(PROGRAM is None, reason="llama-completion, a program of llama.cpp, is not on the PATH")
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_llama_cpp_s_own_jinja_renders_our_prompts(
    kind: Family | str, make_base: MakeBase, tmp_path: Path
) -> None:
    """Its programs have a Jinja of their own, which is smaller than Python's."""
    source: Path | str = "glm-tiny"
    if isinstance(kind, Family):
        source = make_base(kind, "float32")
    elif kind != "glm-tiny":
        sizes = {} if kind in ("glm4", "glm-z1") else {"head_dim": 8}
        source = make_folder(tmp_path / "in", kind, **sizes)
    export(job(source, tmp_path / "out"))
    tokenizer = load_tokenizer(source)
    for talk in ([("user", "你好 how many  legs?")], [("system", "Be short."), ("user", "x = 1")]):
        words = ["-m", str(only_file(tmp_path / "out")), "-t", "1", "--temp", "0", "-n", "2", "--jinja"]
        words += ["-cnv", "-st", "--verbose-prompt", "-p", talk[-1][1]]
        words += ["-sys", talk[0][1]] if len(talk) > 1 else []
        expected = template_for(tokenizer).encode_prompt(tokenizer, messages(talk))
        for _ in range(3):  # its log now and then loses lines when it ends at once
            done = subprocess.run(
                [str(PROGRAM), *words], capture_output=True, check=True, stdin=subprocess.DEVNULL
            )
            written = (done.stdout + done.stderr).decode("utf-8", "replace")
            found = [int(match) for match in re.findall(r" I +(\d+) -> '", written)]
            if found == expected:
                break
        assert found == expected


def test_an_export_for_transformers_goes_on_to_gguf(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    values = {"format": "transformers", "output_dir": tmp_path / "native"}
    start = job("glm-tiny", tmp_path)
    export(ExportJob(**{name: values.get(name, getattr(start, name)) for name in start.__slots__}))
    export(job(tmp_path / "native", tmp_path / "out"))
    model = llama(tmp_path / "out")
    tokenizer = load_tokenizer("glm-tiny")
    check_ids(model, tokenizer)
    ids = template_for(tokenizer).encode_prompt(tokenizer, messages(TALKS[0]))
    assert greedy(model, ids) == greedy(llama(tiny("F16")), ids)


def test_a_released_tokenizer(released_tokenizers: Path, tmp_path: Path) -> None:
    """Whole pages, in Chinese and English, with code and tables, by ChatGLM3's 64,789 pieces."""
    source = tmp_path / "chatglm3"
    source.mkdir()
    shutil.copy(released_tokenizers / "chatglm2-6b" / "tokenizer.model", source)
    tokenizer = load_tokenizer_folder(source, Family.CHATGLM3)
    values = official_config(Family.CHATGLM3, tokenizer, "float32") | {"padded_vocab_size": 65024}
    build_model(native_config(values, Family.CHATGLM3)).save_pretrained(source)
    tokenizer.save_pretrained(str(source))
    export(job(source, tmp_path / "out", "Q8_0"))
    model = llama(tmp_path / "out")
    check_ids(model, tokenizer)
    for page in ("README.md", "README.zh.md"):
        text = (REPO / page).read_text(encoding="utf-8")
        found = model.tokenize(text.encode(), add_bos=False, special=False)
        assert found == tokenizer.text_ids(text)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_files_are_as_good_as_llama_quantize_makes_them(kind: str, tmp_path: Path) -> None:
    """The same types and, but for a few codes, the same bytes from the same weights."""
    folder = make_folder(tmp_path / "in", "glm", hidden_size=256, head_dim=64, intermediate_size=512)
    plain = export(job(folder, tmp_path / "plain", "F32")).folder
    export(job(folder, tmp_path / "out", kind))
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = 1
    theirs = tmp_path / "theirs.gguf"
    done = llama_cpp.llama_model_quantize(
        str(only_file(plain)).encode(), str(theirs).encode(), ctypes.byref(settings)
    )
    assert done == 0
    mine, other, exact = (read_gguf(file) for file in (only_file(tmp_path / "out"), theirs, only_file(plain)))
    assert mine.kinds == other.kinds
    assert mine.values["general.file_type"] == other.values["general.file_type"]
    for name, weight in ((name, exact.tensors[name]) for name in exact.tensors):
        ours_off = float((mine.tensors[name] - weight).norm())
        theirs_off = float((other.tensors[name] - weight).norm())
        assert ours_off <= 1.001 * theirs_off, name
        if kind != "F32":
            equal = (mine.tensors[name] == other.tensors[name]).float().mean()
            assert equal > 0.97, name  # the others are one step off: sums are taken in another order
