"""One flipped byte: a folder that a run left behind is damaged in one place, and a command reads it."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.cases import ANSWERS, CASES, QUESTIONS, Workshop
from tests.faults.injection import Ended, Fault, WarmCommands
from tests.faults.meaning import differences, meaning

DAMAGE = re.compile(
    r"damag|checksum|corrupt|cannot be read|could not be read|unreadable|not whole|incomplete|torn|half-written"
    r"|does not match|other settings|asked again|not readable|falls? back|going back|was changed|left out",
    re.IGNORECASE,
)
"""Words by which a command says that it noticed; looked for in what it does not say otherwise."""
OUTCOMES = ("refused", "said, same result", "harmless", "said, other result", "raw error", "SILENT")


@dataclass(frozen=True)
class Flip:
    """A folder that is damaged, and who reads it.

    Attributes:
        words: the command that reads, after ``glmtune``; ``{NAME}`` is the folder where that case ran undisturbed.
        folder: what is damaged, below the working folder.
        result: what of the working folder is compared; all of it by default.
        copies: where the working folder comes from: name in it -> case whose ``out`` it is.
        interrupted: instead, the case that was begun here and killed by ``at``.
        at: the kill.
        codes: exit codes of success.
    """

    words: tuple[str, ...]
    folder: str = "out"
    result: str = "."
    copies: Mapping[str, str] = field(default_factory=dict)
    interrupted: str = ""
    at: Fault | None = None
    codes: tuple[int, ...] = (0,)


def _in_checkpoint_6() -> Fault:
    return Fault("kill", at=1, ops=("mkdir",), pattern="out/.checkpoint-6.partial")


BASE_ANSWERS = ("predict", "data.max_predict_samples=6", "generation.max_new_tokens=12", "output_dir=answers")
FLIPS: Mapping[str, Flip] = {
    "resume prefix": Flip(CASES["train-prefix"].words, interrupted="train-prefix", at=_in_checkpoint_6()),
    "resume lora": Flip(CASES["train-lora"].words, interrupted="train-lora", at=_in_checkpoint_6()),
    "resume full": Flip(CASES["train-full"].words, interrupted="train-full", at=_in_checkpoint_6()),
    "predict, prefix": Flip(
        (*BASE_ANSWERS, "prefix_path=run"), "run/last", "answers", copies={"run": "train-prefix"}
    ),
    "predict, lora": Flip(
        (*BASE_ANSWERS, "adapter_path=run"), "run/last", "answers", copies={"run": "train-lora"}
    ),
    "resume predict": Flip(
        ("predict", "prefix_path={train-prefix}/out", "compare_base=true", *ANSWERS),
        interrupted="predict",
        at=Fault("kill", at=5, ops=("write",), pattern="*generated_predictions.jsonl"),
    ),
    "score": Flip(
        ("score", "predictions=answers", "num_resamples=100"), "answers", copies={"answers": "predict"}
    ),
    "resume eval": Flip(
        ("eval", "benchmark=ceval", *QUESTIONS),
        interrupted="eval",
        at=Fault("kill", at=5, ops=("write",), pattern="*journal-rank0.jsonl"),
    ),
    "compare runs": Flip(
        ("compare", "runs=[a,b]", "output_dir=out"),
        "a",
        "out",
        copies={"a": "eval", "b": "eval"},
        codes=(0, 3, 4),
    ),
    "predict, quantized": Flip(
        (*BASE_ANSWERS, "model.source=model"), "model", "answers", copies={"model": "quantize"}
    ),
    "predict, exported": Flip(
        (*BASE_ANSWERS, "model.source=model"), "model", "answers", copies={"model": "export-over"}
    ),
}
RUN_FOLDERS = tuple(name for name, flip in FLIPS.items() if "model" not in flip.copies)
"""Those that damage a run folder; the others damage a checkpoint for other tools, whose formats hold no checksums."""


@dataclass(frozen=True)
class Prepared:
    """A flip's folder before the damage, and what the command makes of it.

    Attributes:
        folder: the working folder, not to be changed.
        result: meaning of what is compared.
        ended: how the command ended.
    """

    folder: Path
    result: Mapping[str, Mapping[str, str]]
    ended: Ended


@dataclass(frozen=True)
class Flipped:
    """What came of a flipped byte.

    Attributes:
        place: file, offset, bits changed.
        outcome: one of `OUTCOMES`.
        details: how the results differ, or what was said.
    """

    place: str
    outcome: str
    details: str


def prepare(name: str, workshop: Workshop, commands: WarmCommands) -> Prepared:
    """Make the folder that a flip damages, and run its command on it undamaged."""
    flip = FLIPS[name]
    folder = workshop.root / "flips" / name.replace(", ", "-").replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for target, case in flip.copies.items():
        workshop.undisturbed(case, commands)
        shutil.copytree(workshop.root / "inputs" / case / "out", folder / target)
    if flip.interrupted:
        workshop.undisturbed(flip.interrupted, commands)
        ended = commands.run(workshop.words(flip.interrupted), folder, fault=flip.at)
        if not ended.is_killed:
            raise RuntimeError(f"{name}: was not killed but ended with {ended.code}:\n{ended.output[-2000:]}")
    whole = folder.with_name(f"{folder.name}-whole")
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(folder, whole)
    ended = commands.run(workshop.placed(flip.words), whole)
    if ended.code not in flip.codes:
        raise RuntimeError(f"{name} fails undamaged ({ended.code}):\n{ended.output[-2000:]}")
    return Prepared(folder, meaning(whole / flip.result), ended)


def flip_one(
    name: str,
    trial: str,
    prepared: Prepared,
    workshop: Workshop,
    commands: WarmCommands,
    chance: random.Random,
) -> Flipped:
    """Flip bits of one byte of one file, chosen by chance, and see what the command makes of it."""
    flip = FLIPS[name]
    folder = workshop.root / "work" / trial
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared.folder, folder)
    found = [
        path for path in sorted((folder / flip.folder).rglob("*")) if path.is_file() and path.stat().st_size
    ]
    # By file and not by size: nearly all bytes are weights, but small files decide as much.
    path = chance.choice(found)
    offset, bits = chance.randrange(path.stat().st_size), 1 << chance.randrange(8)
    content = bytearray(path.read_bytes())
    content[offset] ^= bits
    path.unlink()  # `last` and `best` share their files with checkpoints by hard links: one place only
    path.write_bytes(content)
    place = f"{path.relative_to(folder).as_posix()} byte {offset} ^ {bits:#04x}"
    ended = commands.run(workshop.placed(flip.words), folder, timeout=600)
    expected, result = prepared.result, meaning(folder / flip.result)
    # What nobody touched is no result: whoever reads the damaged file one day is a trial of its own, and what
    # cannot be read is left where it is instead of being cleared away.
    untouched = {name for name in result if name not in expected and _is_kept(name, flip, folder, prepared)}
    if path.is_file() and path.read_bytes() == content and path.is_relative_to(folder / flip.result):
        untouched.add(path.relative_to(folder / flip.result).as_posix())
    expected = {name: parts for name, parts in expected.items() if name not in untouched}
    result = {name: parts for name, parts in result.items() if name not in untouched}
    shutil.rmtree(folder, ignore_errors=True)
    outcome, details = judge(expected, prepared.ended, ended, result, flip.codes)
    return Flipped(place, outcome, details)


def _is_kept(name: str, flip: Flip, folder: Path, prepared: Prepared) -> bool:
    before, now = prepared.folder / flip.result / name, folder / flip.result / name
    return before.is_file() and before.read_bytes() == now.read_bytes()


def judge(
    expected: Mapping[str, Mapping[str, str]],
    usual: Ended,
    ended: Ended,
    result: Mapping[str, Mapping[str, str]],
    codes: tuple[int, ...],
) -> tuple[str, str]:
    """Say which of `OUTCOMES` a damage came to, and in which words."""
    if ended.is_raw or ended.code < 0:
        return "raw error", ended.output[-700:]
    known = set(usual.output.splitlines())
    new = "\n".join(line for line in ended.output.splitlines() if line not in known)
    if ended.code not in codes:
        return ("refused" if ended.says_why else "raw error"), new[-700:]
    said = " ".join(line for line in new.splitlines() if DAMAGE.search(line))
    listed = differences(expected, result)
    if listed:
        return ("said, other result" if said else "SILENT"), f"{said} {listed[:4]}"
    return ("said, same result" if said else "harmless"), said
