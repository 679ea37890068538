"""The `glmtune` command: finds the recipe by name, and turns errors into messages."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtune.errors import ConfigError, GlmtuneError, unknown_name
from glmtune.version import __version__

if TYPE_CHECKING:
    from recipes.compose import Command

# Name -> (module holding COMMAND, one line). Kept here so that `glmtune --help` imports no recipe.
COMMANDS = {
    "train": ("recipes.train", "tune a model: P-Tuning v2 (+recipe=ptuning), LoRA, or all its weights"),
    "plan": ("recipes.plan", "say what memory and time a run needs, and the cheapest setting that fits"),
    "predict": ("recipes.predict", "generate answers for a data set and score them"),
    "score": ("recipes.score", "score existing predictions, or compare two runs"),
    "eval": ("recipes.eval", "evaluate on C-Eval, MMLU, GSM8K, BBH by the published protocols"),
    "compare": (
        "recipes.compare",
        "what a quantized or tuned model loses, on paired questions: may it ship?",
    ),
    "data": ("recipes.data", "check a data set before training on it, or fetch a benchmark"),
    "quantize": ("recipes.quantize", "write a quantized copy of a model, with a report of every layer"),
    "export": ("recipes.export", "write a tuned model for transformers, vLLM or the official tools"),
    "info": ("recipes.info", "say what a checkpoint, a prefix or this machine is"),
}
FLAGS = """options:
  -h, --help          this text (instant)
  --cfg               print the composed configuration and stop
  --settings FILE     take all settings from a run's config.yaml, and none from here
  --config-dir DIR    search DIR for configs too (DIR/recipe/mine.yaml -> +recipe=mine)
  --debug             show the stack trace of an error
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; the process's own by default.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted; `compare` also 3
        (exceeds its tolerance) and 4 (undecided), `train` 75 (went back to a checkpoint: start it again).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print_help()
        return 0
    if arguments[0] in ("-V", "--version"):
        sys.stdout.write(f"glmtune {__version__}\n")
        return 0
    _own_packages_first()
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    _quiet_libraries(debug)
    try:
        return _dispatch(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        sys.stderr.write("glmtune: interrupted; what was written so far is kept.\n")
        return 130
    except Exception as error:
        if debug and not _is_launched():
            raise
        return _report(error)


def _own_packages_first() -> None:
    """Let `recipes` and `evaluation` be ours, whoever else has a module of such a common name.

    A wheel holds them under ``glmtune/_packages``, where no other distribution writes; a checkout beside us.
    """
    package = Path(__file__).resolve().parent
    bundled = package / "_packages"
    place = str(bundled if bundled.is_dir() else package.parent)
    if sys.path[0] != place:
        sys.path.insert(0, place)


def _dispatch(name: str, rest: list[str]) -> int:
    if name not in COMMANDS:
        raise ConfigError(unknown_name("Command", name, COMMANDS))
    command = importlib.import_module(COMMANDS[name][0]).COMMAND
    if "-h" in rest or "--help" in rest:
        _print_command_help(command)
        return 0
    show_config = "--cfg" in rest
    if "--settings" in rest:
        return _exit_code(command.run(_stored_settings(rest, command)))
    overrides, extra_configs = _split_flags([word for word in rest if word != "--cfg"], command)
    from recipes.compose import compose, load_settings

    if show_config:
        import yaml

        values = compose(command, overrides, extra_configs)
        sys.stdout.write(yaml.safe_dump(values, allow_unicode=True, sort_keys=False))
        return 0
    settings = load_settings(command, overrides, extra_configs)
    return _exit_code(command.run(settings, overrides) if command.takes_words else command.run(settings))


def _exit_code(result: object) -> int:
    return result if isinstance(result, int) else 0


def _stored_settings(words: list[str], command: Command) -> Any:
    """Read the settings of an earlier run, or those that a launcher hands to its processes."""
    import yaml

    from glmtune.settings import build_settings

    name = words[1] if len(words) == 2 and words[0] == "--settings" else ""
    try:
        values = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"`--settings` must be followed by a file such as a run's config.yaml, and by nothing else; "
            f"got `{' '.join(words)}` ({error})."
        ) from error
    return build_settings(command.schema, values)


def _split_flags(words: list[str], command: Command) -> tuple[list[str], Path | None]:
    """Separate `--config-dir` from overrides, and turn the first bare words into their settings."""
    from recipes.compose import quoted

    extra: Path | None = None
    overrides: list[str] = []
    num_bare = 0
    pending = iter(words)
    for word in pending:
        if word.startswith("--config-dir"):
            value = word.partition("=")[2] or next(pending, "")
            extra = Path(value)
            if not value or not extra.is_dir():
                raise ConfigError(f"`--config-dir` is `{value}`, but it must be an existing folder.")
        elif word.startswith("--") and "=" in word:
            raise ConfigError(
                f"`{word}` is no override: settings are given without dashes, as `{word.lstrip('-')}`."
            )
        elif word.startswith("-"):
            raise ConfigError(
                f"`{word}` is no option here. Options: --help, --cfg, --config-dir DIR, --debug."
            )
        elif "=" not in word and not word.startswith("~"):
            if num_bare == len(command.bare_words) or num_bare < len(overrides):
                raise ConfigError(
                    f"`{word}` is no override: write `setting=value`, such as `trainer.max_steps=100`."
                )
            overrides.append(f"{command.bare_words[num_bare]}={quoted(word)}")
            num_bare += 1
        else:
            overrides.append(word)
    return overrides, extra


def _quiet_libraries(debug: bool) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
        logging.getLogger("transformers").setLevel(logging.ERROR)
        # DeepSpeed, once installed, is imported by libraries in every run and says that it found no GPU.
        logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def _is_launched() -> bool:
    return "GLMTUNE_LAUNCHED" in os.environ


def _report(error: Exception) -> int:
    text = str(error)
    if not isinstance(error, GlmtuneError):
        text = (
            f"unexpected {type(error).__name__}: {error}\n"
            "This is a fault of glmtune or of a library below it; run again with --debug for the stack trace."
        )
    code = error.exit_code if isinstance(error, GlmtuneError) else 1
    if _is_launched():  # one of several processes: the launcher shows one error of one of them
        from glmtune.training.distributed.launch import record_failure

        if record_failure(text, "".join(traceback.format_exception(error))):
            return code
    sys.stderr.write(f"glmtune: {text}\n")
    return code


def _print_help() -> None:
    lines = ["usage: glmtune COMMAND [setting=value ...] [options]", "", "commands:"]
    lines += [f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items()]
    lines += ["", FLAGS.rstrip(), "", "`glmtune COMMAND --help` lists the settings of a command."]
    sys.stdout.write("\n".join(lines) + "\n")


def _print_command_help(command: Command) -> None:
    from recipes.compose import config_groups, setting_rows

    bare = "".join(f" [{name.upper()}]" for name in command.bare_words)
    lines = [f"usage: glmtune {command.name}{bare} [setting=value ...] [options]", "", command.summary]
    if command.examples:
        lines += ["", "examples:", *(f"  {example}" for example in command.examples)]
    roots = {path.split(".")[0] for path, _, _ in setting_rows(command.schema)}
    groups = {name: options for name, options in config_groups().items() if name in roots or name == "recipe"}
    if command.name != "train":
        groups.pop("recipe", None)
    if groups:
        lines += ["", "groups (name=option):"]
        lines += [
            f"  {'+' if name == 'recipe' else ''}{name}={'|'.join(found)}" for name, found in groups.items()
        ]
    rows = [
        (path, "" if default is None else str(default), text)
        for path, default, text in setting_rows(command.schema)
    ]
    width = max(len(path) for path, _, _ in rows) + 2
    lines += ["", "settings (default):"]
    lines += [f"  {path:<{width}}{text}{f' ({default})' if default else ''}" for path, default, text in rows]
    sys.stdout.write("\n".join([*lines, "", FLAGS]))
