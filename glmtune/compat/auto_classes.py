"""After ``import glmtune``, transformers' Auto classes give glmtune's models for official folders and ids.

Official folders name code of their own (``auto_map`` in config.json), which transformers would run under
``trust_remote_code=True``, and which current transformers breaks. Here ``from_pretrained`` of the classes in
`WRAPPED` first asks whether the source is such a release. If so, glmtune loads it, and no code of it runs;
any other model goes to transformers as ever.

transformers must not be imported for this: it takes seconds, and ``glmtune --help`` answers without it. So
the classes are wrapped when their modules are imported, by a finder in front of ``sys.meta_path`` that
leaves all finding to Python's own and adds a step after the module has run.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto"
WRAPPED = {
    f"{AUTO}.modeling_auto": ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"),
    f"{AUTO}.tokenization_auto": ("AutoTokenizer",),
    f"{AUTO}.configuration_auto": ("AutoConfig",),
}
"""Module → its classes that official folders are loaded with (the three model classes: by their READMEs)."""
GENERATES_TEXT = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
"""What ``transformers.pipeline("text-generation")`` knows by name; of other classes it says that they are not
supported."""
OUR_CLASSES = ("OfficialGlmForCausalLM", "OfficialGlm4ForCausalLM", "OfficialChatGlmForCausalLM")


def install() -> None:
    """Wrap the Auto classes, now or when they are imported; doing it again changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in WRAPPED:
        if name in sys.modules:
            _wrap_classes(sys.modules[name])


class _Finder(importlib.abc.MetaPathFinder):
    """Adds `_wrap_classes` to the import of the modules in `WRAPPED`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Called by Python for every import that is not cached; None leaves it to the other finders."""
        if fullname not in WRAPPED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        loader, run = spec.loader, spec.loader.exec_module

        def run_and_wrap(module: ModuleType) -> None:
            run(module)
            _wrap_classes(module)

        loader.exec_module = run_and_wrap
        return spec


def _wrap_classes(module: ModuleType) -> None:
    names = getattr(module, GENERATES_TEXT, None)
    if names is not None:
        names["chatglm"] = OUR_CLASSES  # a type without configuration class there: all else passes over it
    for name in WRAPPED[module.__name__]:
        owner: Any = getattr(module, name, None)
        if owner is not None and not hasattr(owner.from_pretrained, "_glmtune_load"):
            owner.from_pretrained = classmethod(_wrapped(owner.from_pretrained.__func__, name))


def _wrapped(stock: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a `from_pretrained` that gives official releases to glmtune."""

    @functools.wraps(stock)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_official(pretrained_model_name_or_path):
            return stock(cls, pretrained_model_name_or_path, *args, **kwargs)
        from glmtune.compat import from_pretrained as ours

        load = {"AutoTokenizer": ours.auto_tokenizer, "AutoConfig": ours.auto_config}.get(
            name, ours.auto_model
        )
        return load(pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained.__dict__["_glmtune_load"] = True
    return from_pretrained


def is_official(source: object) -> bool:
    """Whether a source is a release that glmtune loads: by its name (preset, hub id), or by a folder's files.

    Nothing is downloaded and no error raised: what is unclear goes to transformers.

    Args:
        source: what the user gave to ``from_pretrained``.
    """
    if not isinstance(source, str | Path):
        return False
    folder = Path(source).expanduser()
    if folder.is_dir():
        kind = _value(folder / "config.json", "model_type")
        if kind is not None:
            return kind == "chatglm"
        return _value(folder / "tokenizer_config.json", "tokenizer_class") in (
            "ChatGLMTokenizer", "ChatGLM4Tokenizer",
        )  # fmt: skip
    from glmtune.models.releases.presets import PRESETS
    from glmtune.models.releases.source import is_hub_id

    if source in PRESETS:
        return True
    # By name, before anything is fetched: newer models of the same owners (GLM-4-0414, GLM-4.5, the `-hf`
    # conversions) are transformers' own.
    return isinstance(source, str) and is_hub_id(source) and _is_release(source.split("/")[1].lower())


def _is_release(name: str) -> bool:
    from glmtune.models.releases.families import Family
    from glmtune.models.releases.presets import PRESETS

    ours = [preset for preset, found in PRESETS.items() if found.family is not Family.TRANSFORMERS]
    return any(name == preset or name in (f"{preset}-int4", f"{preset}-int8") for preset in ours)


def _value(file: Path, key: str) -> object:
    """Return a value of a JSON file that strangers wrote, None where it cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found.get(key) if isinstance(found, dict) else None
