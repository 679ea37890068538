"""`pipeline(task="chat")`: the call on the page of the INT8 release at ModelScope, on glmtune's models.

::

    pipe = pipeline(task="chat", model="ZhipuAI/ChatGLM-6B-Int8")
    result = pipe({"text": "你好", "history": []})
    result = pipe({"text": "再说一遍", "history": result["history"]})
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glmtune.errors import ConfigError, DataError, unknown_name
from glmtune.loading import load_model, load_tokenizer
from glmtune.models.releases.hub import MODELSCOPE, MODELSCOPE_OWNER

TASKS = ("chat",)
INPUTS = ("text", "history")


class ChatPipeline:
    """Answers dictionaries of ``text`` and ``history``.

    Attributes:
        model: as `load_model` loads it.
        tokenizer: of it.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take a model and its tokenizer."""
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, inputs: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
        """Answer.

        Args:
            inputs: ``text``, the question, and ``history`` as the call before returned it (or nothing);
                further entries are settings, as ModelScope's page has them.
            **settings: of `model.chat` (``max_length``, ``temperature``, ``prefix_strength``, ...).

        Returns:
            ``response`` and ``history``.

        Raises:
            DataError: there is no ``text``; the history has another form than the release's.
            ConfigError: a setting that does not exist.
        """
        if not isinstance(inputs, Mapping) or "text" not in inputs:
            raise DataError(
                f"The pipeline got {inputs!r:.60}, but it takes a dictionary with `text` (and `history`). "
                "Write {'text': '...', 'history': []}."
            )
        more = {name: value for name, value in inputs.items() if name not in INPUTS}
        history = inputs.get("history")
        response, history = self.model.chat(
            self.tokenizer, inputs["text"], self._turns(history), **{**more, **settings}
        )
        return {"response": response, "history": history}

    @staticmethod
    def _turns(history: Any) -> Any:
        """Pairs come back from JSON as lists, which `chat` takes as well; nothing is an empty history."""
        return [tuple(turn) if isinstance(turn, list) else turn for turn in history or ()]


def pipeline(
    task: str,
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model_revision: str | None = None,
    **options: Any,
) -> ChatPipeline:
    """Make what answers ``{'text': ..., 'history': ...}``, as ModelScope's function of this name.

    Args:
        task: ``chat`` (`modelscope.utils.constant.Tasks.chat` is this word).
        model: a loaded model; or what `load_model` takes, or an id at ModelScope (``ZhipuAI/...``).
        tokenizer: of a loaded model; None loads it by the model's source.
        model_revision: must be None: the newest is taken.
        **options: of `load_model`; a ``device`` of ``gpu`` is ``cuda``.

    Raises:
        ConfigError: another task; a revision; see `load_model`.
        CheckpointError: see `load_model`.
    """
    if task not in TASKS:
        raise ConfigError(
            unknown_name("`task`", task, TASKS) + " For `text-generation` use `transformers.pipeline`."
        )
    if model_revision is not None:
        raise ConfigError(
            f"`model_revision` is `{model_revision}`, but ModelScope's newest is taken. Leave it out, or "
            "download that revision and give its folder."
        )
    if isinstance(model, str | Path):
        source = str(model)
        if source.startswith(f"{MODELSCOPE_OWNER}/") and not Path(source).is_dir():
            source = MODELSCOPE + source
        if options.get("device") == "gpu":
            options["device"] = "cuda"
        return ChatPipeline(load_model(source, **options), tokenizer or load_tokenizer(source))
    if options:
        raise ConfigError(
            f"`{next(iter(options))}` is given with a model that is loaded already. Give it to `load_model`."
        )
    return ChatPipeline(model, tokenizer or load_tokenizer(str(getattr(model, "source", ""))))
