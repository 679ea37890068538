"""The `glmtune` command: finds the recipe by name, and turns errors into messages."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtune.errors import ConfigError, GlmtuneError, UnknownSettingError, unknown_name
from glmtune.terminal.text import guard_output, shown, write, write_error
from glmtune.version import __version__

if TYPE_CHECKING:
    from recipes.words.compose import Command

# Name -> (module holding COMMAND, one line). Kept here so that `glmtune --help` imports no recipe.
COMMANDS = {
    "quickstart": (
        "recipes.flows.quickstart",
        "tune the embedded model, and see what changed",
    ),
    "train": ("recipes.train", "tune a model: P-Tuning v2 (+recipe=ptuning), LoRA, or all its weights"),
    "plan": ("recipes.plan", "say what memory and time a run needs, and the cheapest setting that fits"),
    "predict": ("recipes.predict", "generate answers for a data set and score them"),
    "score": ("recipes.score", "score existing predictions, or compare two runs"),
    "eval": ("recipes.eval", "evaluate on C-Eval, MMLU, GSM8K, BBH by the published protocols"),
    "sweep": (
        "recipes.flows.sweep",
        "train with several values of settings (grid, Optuna), and tell the best from the lucky",
    ),
    "dial": ("recipes.dial", "measure task score and retention of a prefix or LoRA at several strengths"),
    "compare": (
        "recipes.compare",
        "what a quantized or tuned model loses, on paired questions: may it ship?",
    ),
    "chat": ("recipes.chat", "talk to a model in the terminal"),
    "serve": ("recipes.serve", "serve a model over HTTP: OpenAI's interface, the original api.py's, a page"),
    "web": ("recipes.web", "talk to a model on a web page"),
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
        The exit code: 0 done, 1 failed, 2 wrong usage or configuration, 128 + N stopped by signal N (130
        is Ctrl-C); `compare` also 3 (exceeds its tolerance) and 4 (undecided), `eval` 5 (some questions got
        no answer), `sweep` 5 (some trials failed), `train` 75 (went back to a checkpoint: start it again).
    """
    guard_output()
    arguments = list(sys.argv[1:] if argv is None else argv)
    # `deepspeed --module glmtune train` says it a second time, in front of all.
    if "LOCAL_RANK" in os.environ:
        arguments = [word for word in arguments if not re.fullmatch(r"--local[_-]rank=[0-9]+", word)]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print_help()
        return 0
    if arguments[0] in ("-V", "--version"):
        write(f"glmtune {__version__}\n")
        return 0
    _own_packages_first()
    from glmtune import signals
    from glmtune.training.distributed import parent

    parent.watch()
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    _quiet_libraries(debug)
    try:
        # A launcher's processes may wait for each other where no handler of Python's would run.
        with contextlib.nullcontext() if parent.is_started() else signals.raised():
            return _dispatch(arguments[0], arguments[1:])
    except signals.StoppedBySignal as stop:
        write_error(f"glmtune: stopped by {stop}; what was written so far is kept.\n")
        return 128 + stop.number
    except KeyboardInterrupt:
        write_error("glmtune: interrupted; what was written so far is kept.\n")
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


@contextmanager
def _thread_errors_in_words() -> Generator[None]:
    """Word what ends a thread of a library, where Python would print a stack trace.

    TensorBoard's ends so on a full disk; the run learns of it with its next line and stops by itself.
    """

    def say(ended: threading.ExceptHookArgs) -> None:
        write_error(f"glmtune: a part in the background failed: {ended.exc_value}\n")

    before = threading.excepthook
    if "--debug" not in sys.argv:
        threading.excepthook = say
    try:
        yield
    finally:
        threading.excepthook = before


def command_named(name: str) -> Command:
    """Import a command's recipe.

    Raises:
        ConfigError: no command has this name; nearest first.
    """
    if name not in COMMANDS:
        raise ConfigError(unknown_name("Command", name, COMMANDS))
    return importlib.import_module(COMMANDS[name][0]).COMMAND


@_thread_errors_in_words()
def _dispatch(name: str, rest: list[str]) -> int:
    command = command_named(name)
    if "-h" in rest or "--help" in rest:
        _print_command_help(command)
        return 0
    show_config = "--cfg" in rest
    if "--settings" in rest:
        return _exit_code(command.run(_stored_settings(rest, command)))
    from recipes.words.compose import compose_as_given, load_settings
    from recipes.words.reading import read_words

    reading = read_words([word for word in rest if word != "--cfg"], command)
    overrides, extra_configs = reading.overrides, reading.config_dir
    if os.environ.get("RANK", "0") == "0":  # torchrun starts as many of us as there are processes
        write_error("".join(f"glmtune: {note}\n" for note in reading.notes))
    if show_config:
        import yaml

        values = compose_as_given(command, overrides, extra_configs)
        text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False)
        # Where YAML would leave a character that a terminal obeys, all are written in its own escapes.
        readable = shown(text) == text
        write(text if readable else yaml.safe_dump(values, allow_unicode=False, sort_keys=False))
        return 0
    settings = load_settings(command, overrides, extra_configs)
    if command.takes_several:
        return _exit_code(command.run(settings, overrides, extra_configs))
    return _exit_code(command.run(settings, overrides) if command.takes_words else command.run(settings))


def _exit_code(result: object) -> int:
    return result if isinstance(result, int) else 0


def _stored_settings(words: list[str], command: Command) -> Any:
    """Read the settings of an earlier run, or those that a launcher hands to its processes."""
    from recipes.words.compose import read_settings

    if len(words) != 2 or words[0] != "--settings":
        raise ConfigError(
            f"`--settings` must be followed by a file such as a run's config.yaml, and by nothing else; "
            f"got `{' '.join(words)}`."
        )
    return read_settings(command, Path(words[1]))


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


def _commands_with(setting: str) -> list[str]:
    """Return the commands that have a setting or group of this name.

    Commands had other names once (`dial` was `sweep`), and settings are typed that belong to the neighbour.
    """
    found = {name: command_named(name) for name in COMMANDS}
    return [name for name, each in found.items() if setting in (*each.types, *each.sections, *each.groups)]


def _report(error: Exception) -> int:
    text = str(error)
    if not isinstance(error, GlmtuneError):
        text = (
            f"unexpected {type(error).__name__}: {error}\n"
            "This is a fault of glmtune or of a library below it; run again with --debug for the stack trace."
        )
    elif isinstance(error, UnknownSettingError):
        text = str(error.of_commands(_commands_with(error.key)))
    elif error.anchor is not None:
        text += f"\nMore: docs/trouble.md#{error.anchor}"
    code = error.exit_code if isinstance(error, GlmtuneError) else 1
    if _is_launched():  # one of several processes: the launcher shows one error of one of them
        from glmtune.training.distributed.launch import record_failure

        if record_failure(text, "".join(traceback.format_exception(error))):
            return code
    write_error(f"glmtune: {text}\n")
    return code


def _print_help() -> None:
    lines = ["usage: glmtune COMMAND [setting=value ...] [options]", "", "commands:"]
    lines += [f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items()]
    lines += ["", FLAGS.rstrip(), "", "`glmtune COMMAND --help` lists the settings of a command."]
    write("\n".join(lines) + "\n")


def _print_command_help(command: Command) -> None:
    from recipes.words.compose import config_groups, setting_rows

    bare = "".join(f" [{name.upper()}]" for name in command.bare_words)
    lines = [f"usage: glmtune {command.name}{bare} [setting=value ...] [options]", "", command.summary]
    if command.examples:
        lines += ["", "examples:", *(f"  {example}" for example in command.examples)]
    roots = {path.split(".")[0] for path, _, _ in setting_rows(command.schema)}
    groups = {name: options for name, options in config_groups().items() if name in roots or name == "recipe"}
    if command.name not in ("train", "sweep"):
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
    write("\n".join([*lines, "", FLAGS]))
