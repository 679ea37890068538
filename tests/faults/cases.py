"""The commands that write, in settings small enough for a second each, and what each of them ends with undisturbed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.injection import Ended, Fault, WarmCommands
from tests.faults.meaning import meaning

STEPS = (
    "retention=null",
    "trainer.max_steps=6",
    "trainer.save_steps=2",
    "trainer.eval_steps=2",
    "trainer.logging_steps=1",
    "trainer.per_device_train_batch_size=2",
    "trainer.gradient_accumulation_steps=1",
    "trainer.num_threads=1",
    "data.max_train_samples=20",
    "data.max_eval_samples=4",
    "output_dir=out",
)
LONGER = ("trainer.max_steps=24", "trainer.save_steps=6", "trainer.eval_steps=12")
"""Where workers must have something to go on with when their launcher is gone."""
ANSWERS = ("data.max_predict_samples=6", "generation.max_new_tokens=12", "output_dir=out")
# Three subjects' questions that the embedded model answers in a few words; the others it drags out to the limit.
QUESTIONS = (
    "benchmark.subjects=[high_school_biology,high_school_geography,chinese_language_and_literature]",
    "benchmark.limit=2",
    "num_threads=1",
    "engine.batch_size=2",
    "output_dir=out",
)


@dataclass(frozen=True)
class Case:
    """One command that is spoilt.

    Attributes:
        words: after ``glmtune``; ``{NAME}`` is the folder where the case of that name ran undisturbed.
        needs: names of those cases.
        before: an earlier command in the same folder, whose result this one replaces.
        codes: exit codes of success.
        processes: more than one: started for real, with a launcher.
    """

    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    codes: tuple[int, ...] = (0,)
    processes: int = 1


CASES: Mapping[str, Case] = {
    "train-prefix": Case(("train", "+recipe=ptuning", "trainer.save_total_limit=2", *STEPS)),
    "train-lora": Case(("train", "+recipe=lora", *STEPS)),
    "train-full": Case(("train", "+recipe=full", "trainer.save_total_limit=1", *STEPS)),
    "train-async": Case(("train", "+recipe=ptuning", "trainer.async_save=true", *STEPS)),
    "predict": Case(
        ("predict", "prefix_path={train-prefix}/out", "compare_base=true", *ANSWERS), ("train-prefix",)
    ),
    "quantize": Case(("quantize", "bits=4", "output_dir=out")),
    "quantize-over": Case(
        ("quantize", "bits=4", "overwrite=true", "output_dir=out"),
        before=("quantize", "bits=8", "output_dir=out"),
    ),
    "export": Case(("export", "adapter_path={train-lora}/out", "output_dir=out"), ("train-lora",)),
    "export-over": Case(
        ("export", "prefix_path={train-prefix}/out", "format=official", "overwrite=true", "output_dir=out"),
        ("train-prefix",),
        before=("export", "format=official", "output_dir=out"),
    ),
    "eval": Case(("eval", "benchmark=ceval", *QUESTIONS)),
    "compare": Case(
        (
            "compare",
            "benchmark=mmlu",
            "protocol=few_shot_direct",
            "is_chat=false",
            "benchmark.limit=2",
            "baseline.quantization=bf16",
            "candidate.quantization=int4",
            "num_threads=1",
            "output_dir=out",
        ),
        codes=(0, 3, 4),
    ),
    "score": Case(("score", "predictions=answers", "num_resamples=100"), ("predict",)),
    "data": Case(("data", "check", "data=ads", "report_file=out/report.json")),
    "two-processes": Case(
        ("train", "+recipe=ptuning", "launch.num_processes=2", *STEPS, *LONGER), processes=2
    ),
    "two-deepspeed": Case(
        ("train", "+recipe=full", "deepspeed=zero2", "launch.num_processes=2", *STEPS, *LONGER), processes=2
    ),
}
ALONE = tuple(name for name, case in CASES.items() if case.processes == 1)
"""Cases of one process, which run as forks."""


@dataclass(frozen=True)
class Undisturbed:
    """What a case comes to when nothing disturbs it.

    Attributes:
        result: the meaning of its working folder.
        earlier: the meaning before it ran; empty but for cases that replace something.
        ended: how it ended; its operations are those that a fault can hit.
    """

    result: Mapping[str, Mapping[str, str]]
    earlier: Mapping[str, Mapping[str, str]]
    ended: Ended


@dataclass
class Workshop:
    """Working folders for cases, and their undisturbed results, each computed when it is first asked for.

    Attributes:
        root: everything lies below it: ``inputs/CASE`` what ran undisturbed, ``work/NAME`` what is being spoilt.
    """

    root: Path
    _known: dict[str, Undisturbed] = field(default_factory=dict)

    def words(self, name: str) -> list[str]:
        """Return the words of a case, with the places of what it needs."""
        return self.placed(CASES[name].words)

    def placed(self, words: tuple[str, ...]) -> list[str]:
        """Put in the places of what ran undisturbed."""
        places = {name: str(self.root / "inputs" / name) for name in CASES}
        return [word.format_map(places) if "{" in word else word for word in words]

    def folder(self, name: str, trial: str, commands: WarmCommands) -> Path:
        """Make the working folder for a trial of a case, as it is before the case runs."""
        return self._begin(name, self.root / "work" / trial, commands)

    def undisturbed(self, name: str, commands: WarmCommands) -> Undisturbed:
        """Run a case, and before it what it needs, with nothing in its way; once."""
        if name not in self._known:
            for needed in CASES[name].needs:
                self.undisturbed(needed, commands)
            folder = self._begin(name, self.root / "inputs" / name, commands)
            earlier = meaning(folder)
            ended = commands.run(self.words(name), folder, fault=Fault())
            if ended.code not in CASES[name].codes:
                raise RuntimeError(f"{name} fails undisturbed ({ended.code}):\n{ended.output[-3000:]}")
            self._known[name] = Undisturbed(meaning(folder), earlier, ended)
        return self._known[name]

    def _begin(self, name: str, folder: Path, commands: WarmCommands) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if name == "score":
            shutil.copytree(self.root / "inputs" / "predict" / "out", folder / "answers")
        if CASES[name].before:
            ended = commands.run(self.placed(CASES[name].before), folder)
            if ended.code != 0:
                raise RuntimeError(f"{name}: what it replaces cannot be made:\n{ended.output[-3000:]}")
        return folder
