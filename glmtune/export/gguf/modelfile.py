r"""A Modelfile, by which Ollama makes a model of a GGUF file: prompts as a Go template, stops, sampling.

Ollama has an own language of templates. For prompts in which every message opens with words of its role, one
is made of what the Jinja template renders: for some conversations, whose pieces tell what stands in front of
each role. ChatGLM2's, which counts rounds, is written down here; Go has no arithmetic in templates, so a text
grows by a letter a round, and its length is the number.

What the form cannot: tools, metadata of messages, an answer that is to be gone on with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import GenerationConfig

from glmtune.errors import DataError
from glmtune.export.gguf.templates import PROMPTS
from glmtune.export.gguf.vocabulary import Vocabulary
from glmtune.messages import Message
from glmtune.models.releases.families import Family
from glmtune.models.templates.folder import FolderTemplate, folder_template

ROUNDS = (
    "[gMASK]<sop>{{ if .System }}{{ .System }}\n\n{{ end }}"
    '{{ $round := "" }}{{ range .Messages }}'
    '{{ if eq .Role "user" }}{{ if $round }}\n\n{{ end }}{{ $round = printf "%s." $round }}'
    "[Round {{ len $round }}]\n\n问：{{ .Content }}"
    '{{ else if eq .Role "assistant" }}\n\n答：{{ .Content }}{{ end }}{{ end }}\n\n答：'
)
"""ChatGLM2's prompts."""
OLLAMA_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "observation": "tool"}
"""Our roles → Ollama's."""
EMPTY_MESSAGES = ("kept", "left out", "without blank")
"""What templates do with a message without text: ChatGLM3's has a blank in front of others alone."""
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repeat_penalty",
}


def modelfile(
    file_name: str, vocabulary: Vocabulary, family: Family, generation: GenerationConfig | None
) -> str:
    """Return the Modelfile of a GGUF file beside it.

    Args:
        file_name: of the GGUF file.
        vocabulary: of the model.
        family: its release line.
        generation: how the release samples; None if it does not say.
    """
    lines = [f"# ollama create NAME -f Modelfile\nFROM ./{file_name}"]
    template = go_template(vocabulary, family)
    if template is None:
        lines.append(
            "# The checkpoint's chat template has no form that Ollama could render: prompts are plain text "
            "here.\n# Programs that read Jinja find the template in the GGUF file."
        )
        template = f"{vocabulary.prefix}{{{{ .Prompt }}}}"
    lines.append(f'TEMPLATE """{template}"""')
    lines += [f'PARAMETER stop "{text}"' for text in vocabulary.ends()]
    lines += [f"PARAMETER {name} {value:g}" for name, value in _sampling(generation).items()]
    return "\n".join(lines) + "\n"


def _sampling(generation: GenerationConfig | None) -> Mapping[str, float]:
    if generation is None:
        return {}
    if not generation.do_sample:
        return {"temperature": 0.0, "repeat_penalty": 1.0}
    told = {theirs: getattr(generation, ours, None) for ours, theirs in _SAMPLING.items()}
    # Ollama's own is 1.1, which no release of GLM was tuned with.
    return {"repeat_penalty": 1.0} | {name: float(value) for name, value in told.items() if value is not None}


def go_template(vocabulary: Vocabulary, family: Family) -> str | None:
    """Return the prompts of a model as a Go template.

    Args:
        vocabulary: of the model; holds the chat template.
        family: its release line.

    Returns:
        The template; None where the Jinja template has no form that Ollama could render.
    """
    source = vocabulary.chat_template
    if source is None:
        system = "{{ if .System }}{{ .System }}\n{{ end }}" if family is Family.CODEGEEX2 else ""
        return f"{vocabulary.prefix}{system}{{{{ .Prompt }}}}"
    if source == PROMPTS[Family.CHATGLM2]:
        return ROUNDS
    try:
        made = _of_roles(folder_template(source))
    except DataError:  # it refuses one of the conversations
        return None
    return None if made is None or '"""' in made else made


def _of_roles(template: FolderTemplate) -> str | None:
    """Make a template in which words of its role stand in front of every message, and others at the end."""
    start, assistant, user, asked = _literals(template, "user", "assistant", "user")
    opening = start.removesuffix(user)
    front = {"user": user, "assistant": assistant}
    front["system"] = _literals(template, "system", "user")[0].removeprefix(opening)
    checked = [_conversation("user"), _conversation("system", "user", "assistant", "user")]
    try:
        front["observation"] = _literals(template, "user", "assistant", "observation")[2]
        checked.append(_conversation("user", "assistant", "observation"))
    except DataError:
        pass  # a template without tools
    empty = [Message("user", "1"), Message("assistant", ""), Message("user", "2")]
    for rule in EMPTY_MESSAGES:
        # Wherever the pieces came from: what they make must be what the template renders.
        if all(
            template.render(messages) == _joined(messages, opening, front, asked, rule)
            for messages in (*checked, empty)
        ):
            return _in_go(opening, front, asked, rule)
    return None


def _literals(template: FolderTemplate, *roles: str) -> list[str]:
    """Return what a template writes in front of, between and behind the messages of a conversation.

    Raises:
        DataError: it refuses the conversation, or its contents are not found in what it renders.
    """
    messages = _conversation(*roles)
    rest, found = template.render(messages), list[str]()
    for message in messages:
        literal, mark, rest = rest.partition(message.content)
        if not mark:
            raise DataError("The chat template leaves a message out.")
        found.append(literal)
    return [*found, rest]


def _conversation(*roles: str) -> list[Message]:
    return [Message(role, f"({place})") for place, role in enumerate(roles)]  # pyright: ignore[reportArgumentType]


def _joined(
    messages: Sequence[Message], opening: str, front: Mapping[str, str], asked: str, rule: str
) -> str:
    parts = [opening]
    for message in messages:
        text = front[message.role]
        if message.content:
            parts.append(text + message.content)
        elif rule != "left out":
            parts.append(text.removesuffix(" ") if rule == "without blank" else text)
    return "".join([*parts, asked])


def _in_go(opening: str, front: Mapping[str, str], asked: str, rule: str) -> str | None:
    if any("{{" in text or "}}" in text for text in (opening, asked, *front.values())):
        return None
    body = ""
    for role, text in front.items():
        content = "{{ .Content }}"
        if rule == "without blank" and text.endswith(" "):
            text, content = text[:-1], "{{ if .Content }} {{ .Content }}{{ end }}"
        body += f'{{{{ {"else if" if body else "if"} eq .Role "{OLLAMA_ROLES[role]}" }}}}{text}{content}'
    body += "{{ end }}"
    if rule == "left out":
        body = f"{{{{ if .Content }}}}{body}{{{{ end }}}}"
    return f"{opening}{{{{ range .Messages }}}}{body}{{{{ end }}}}{asked}"
