"""What tuning glm-tiny for advertisements costs of what it knew, by method: task loss beside retention.

Every arm tunes the embedded model on ``data/ads`` with several seeds. Then the tuned models sit an exam (that
of glm-tiny, rows its corpus never had), and each is paired, question by question, with the base. Runs and
measurements are files below FOLDER: what is there is not done again, so that a killed benchmark goes on, and
two processes with other ``--arms`` share the work.

python benchmarks/retention.py train FOLDER        # hours on one core
python benchmarks/retention.py measure FOLDER
python benchmarks/retention.py report FOLDER benchmarks/results/retention.md

With ``--adgen ADGEN`` the task is ADGEN, whose official train.json and dev.json lie in that folder.

`report` adds to the figures beside the report (``retention.json``), so that other seeds can be run elsewhere.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evaluation.metrics import Score, interval
from glmtune.data.dataset import load_split
from glmtune.data.settings import DataSettings
from glmtune.inference.predict.generate import generate_completions
from glmtune.inference.settings import GenerationSettings
from glmtune.loading import load_model, load_tokenizer
from glmtune.metrics.text import score_row
from glmtune.models.templates.renderer import template_for
from glmtune.retention.base_answers import make_answers
from glmtune.retention.distributions import base_distributions
from glmtune.retention.measure import Base, ask, left_to_base, summarize
from glmtune.retention.prompts import load_prompts
from glmtune.retention.style import TaskStyle
from glmtune.switch.model import decide_prompts, switch_of
from glmtune.tiny.corpus.sample import Sample
from glmtune.tiny.exam import exam, is_right

PREFIX = ("+recipe=ptuning_official",)
LORA = ("+recipe=lora",)
FULL = ("+recipe=full",)


@dataclass(frozen=True)
class Arm:
    """One way to tune.

    Attributes:
        title: what the report calls it.
        words: of ``glmtune train``.
        steps: optimizer steps of 16 task rows.
    """

    title: str
    words: tuple[str, ...]
    steps: int = 200


@dataclass(frozen=True)
class Task:
    """What is learnt.

    Attributes:
        title: what the report calls it.
        train_file: rows of ``content`` and ``summary``.
        dev_file: others.
        words: of ``glmtune train``.
    """

    title: str
    train_file: Path
    dev_file: Path
    words: tuple[str, ...] = ()

    def texts(self) -> list[str]:
        """Return the texts that are learnt."""
        lines = self.train_file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["summary"] for line in lines]


ADS = Task("`data/ads`", Path("data/ads/train.jsonl"), Path("data/ads/dev.jsonl"))


def adgen(folder: Path) -> Task:
    """Return ADGEN as the task."""
    words = ("data=adgen", f"data.dir={folder}", "data.max_eval_samples=200")
    return Task("ADGEN", folder / "train.json", folder / "dev.json", words)


ARMS = {
    "official": Arm("official prefix", PREFIX),
    "official-400": Arm("official prefix, 400 steps", PREFIX, 400),
    "zero": Arm("prefix from zero", (*PREFIX, "prefix.init=zero")),
    "gate": Arm("gated prefix", (*PREFIX, "prefix.gate=true")),
    "mixed": Arm("general rows mixed into the data, 19 % of rows, one mean", PREFIX),
    "retain": Arm("prefix, retain=normal", (*PREFIX, "retain=normal")),
    "strict-400": Arm("prefix, retain=strict, 400 steps", (*PREFIX, "retain=strict"), 400),
    "kl": Arm("prefix, retain=normal by KL", (*PREFIX, "retain=normal", "retain.loss=kl")),
    "kl-strict-400": Arm(
        "prefix, retain=strict by KL, 400 steps", (*PREFIX, "retain=strict", "retain.loss=kl"), 400
    ),
    "self": Arm(
        "prefix, KL on prompts of the base's own",
        (*PREFIX, "retain=normal", "retain.loss=kl", "retain.prompts=self"),
    ),
    "gate-strict-400": Arm(
        "gated prefix, retain=strict, 400 steps", (*PREFIX, "prefix.gate=true", "retain=strict"), 400
    ),
    "switch": Arm("prefix with the switch", (*PREFIX, "prefix.switch=true")),
    "gate-switch": Arm("gated prefix with the switch", (*PREFIX, "prefix.gate=true", "prefix.switch=true")),
    "lora": Arm("LoRA, rank 8", LORA),
    "lora-strict-400": Arm("LoRA, retain=strict, 400 steps", (*LORA, "retain=strict"), 400),
    "lora-switch": Arm("LoRA with the switch", (*LORA, "lora.switch=true")),
    "full": Arm("all weights", FULL),
    "full-strict-400": Arm("all weights, retain=strict, 400 steps", (*FULL, "retain=strict"), 400),
}
SEEDS = (1, 2, 3)
PER_SKILL = 70
"""Exam questions of each skill: the base has well over 200 of them right."""
TASK_ROWS = 60
GENERAL_TOKENS = 64
"""Longest answer to a general prompt."""


def run_of(folder: Path, arm: str, seed: int) -> Path:
    """Return the run folder of an arm."""
    return folder / f"{arm}-{seed}"


def train(folder: Path, task: Task, arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Tune every arm with every seed, and note what each took."""
    for seed in seeds:
        for name in arms:
            run = run_of(folder, name, seed)
            if (run / "cost.json").is_file():
                continue
            words = command(task, ARMS[name], run, seed)
            if name == "mixed":
                words.append(f"data.train_file={mixed_file(folder, task)}")
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            (run / "cost.json").write_text(json.dumps({"cpu_seconds": seconds}), encoding="utf-8")


def mixed_file(folder: Path, task: Task) -> Path:
    """Write what users are told to train on: the task, and 19 % of general rows, answered by the base."""
    file = folder / "mixed.jsonl"
    if not file.is_file():
        tasks = task.train_file.read_text(encoding="utf-8").splitlines()
        prompts = [each for each in load_prompts("shipped", shipped="retain") if len(each.messages) == 1]
        count = round(len(tasks) * 0.19 / 0.81)
        model, tokenizer = load_model("glm-tiny"), load_tokenizer("glm-tiny")
        answers = make_answers(model, tokenizer, prompts[:count], max_new_tokens=128)
        rows = [
            json.dumps({"content": prompt.messages[0].content, "summary": text}, ensure_ascii=False)
            for prompt, text in zip(answers.prompts, answers.texts, strict=True)
        ]
        file.write_text("\n".join([*tasks, *rows, ""]), encoding="utf-8")
    return file


def command(task: Task, arm: Arm, run: Path, seed: int) -> list[str]:
    """Return the words that tune an arm."""
    return [
        *(sys.executable, "-m", "glmtune", "train", *arm.words, *task.words),
        *(f"output_dir={run}", f"seed={seed}", "resume=never", "retention=null", "trainer.num_threads=1"),
        *(f"trainer.max_steps={arm.steps}", f"trainer.save_steps={arm.steps}", "trainer.report_to=[]"),
    ]


def measure(folder: Path, task: Task, arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Let the base, and every tuned model there is, sit the exam and write advertisements."""
    model = load_model("glm-tiny")
    if not (folder / "base.json").is_file():
        write(folder / "base.json", answers_of(model, task))
    base = general_base(model, task)
    for name in arms:
        for seed in seeds:
            run = run_of(folder, name, seed)
            if (run / "cost.json").is_file() and not (run / "answers.json").is_file():
                last = str(run / "last")
                kind = {"+recipe=lora": "adapter", "+recipe=full": None}.get(ARMS[name].words[0], "prefix")
                tuned: Any = {} if kind is None else {kind: last}
                model = load_model(last if kind is None else "glm-tiny", **tuned)
                write(run / "answers.json", {**answers_of(model, task), **kept_of(model, base)})


def general_base(model: Any, task: Task) -> Base:
    """Return what the base says to the shipped general prompts, and how likely each of its tokens is."""
    tokenizer: Any = load_tokenizer("glm-tiny")
    answers = make_answers(
        model, tokenizer, load_prompts("shipped", shipped="retention"), max_new_tokens=GENERAL_TOKENS
    )
    rows = list(zip(answers.prompt_ids, answers.answer_ids, strict=True))
    distributions = base_distributions(model, rows, pad_token_id=tokenizer.pad_token_id, batch_size=16)
    return Base(answers, distributions, TaskStyle(task.texts(), answers.texts))


def kept_of(model: Any, base: Base) -> dict[str, float]:
    """Return KL per token, leaks and identical answers at general prompts; a switch decides as in use."""
    everything, off = range(len(base.answers)), set[int]()
    if (switch := switch_of(model)) is not None:
        prompts = [torch.tensor(ids) for ids in base.answers.prompt_ids]
        is_on = decide_prompts(model, switch, prompts)
        off = {at for at in everything if not is_on[at]}
    on = [at for at in everything if at not in off]
    tokenizer: Any = load_tokenizer("glm-tiny")
    found = ask(model, tokenizer, base, on, max_new_tokens=GENERAL_TOKENS, batch_size=16) if on else []
    kept = summarize([*left_to_base(base, off), *found])
    return {"kl": kept.kl_nats, "leaks": kept.leak_frac, "identical": kept.kept_frac}


def answers_of(model: Any, task: Task) -> dict[str, Any]:
    """Return what a model answers in the exam, what of it is right, and ROUGE-L (%) of its ads."""
    tokenizer: Any = load_tokenizer("glm-tiny")
    template = template_for(tokenizer)

    def answer(prompts: Sequence[Sequence[int]]) -> list[str]:
        texts = [""] * len(prompts)
        settings = GenerationSettings(max_new_tokens=120, batch_size=64)
        for done in generate_completions(model, tokenizer, prompts, settings):
            texts[done.index] = done.text
        return texts

    questions = exam_questions()
    answers = answer([template.encode_prompt(tokenizer, each.messages[:-1]) for each in questions])
    split = load_split(
        DataSettings(train_file=str(task.dev_file), max_train_samples=TASK_ROWS), "train", tokenizer
    )
    rows: Any = split.rows
    tasks = [(list(row["input_ids"]), list(row["labels"])) for row in rows]
    ads = answer(
        [ids[: next(at for at, label in enumerate(labels) if label != -100)] for ids, labels in tasks]
    )
    references = [
        tokenizer.decode([label for label in labels if label != -100], skip_special_tokens=True)
        for _, labels in tasks
    ]
    rouge = [
        score_row(ad, str(reference)).named()["rouge-l"]
        for ad, reference in zip(ads, references, strict=True)
    ]
    return {
        "right": [is_right(question, text) for question, text in zip(questions, answers, strict=True)],
        "answers": answers,
        "rouge_l": statistics.mean(rouge),
    }


def exam_questions() -> list[Sample]:
    """Return the exam's questions; advertisements are the task, and so none."""
    return [sample for sample in exam(PER_SKILL, seed=7) if sample.skill != "ads"]


@dataclass(frozen=True)
class Result:
    """What one arm came to; every list has a value of each seed.

    Attributes:
        loss: evaluation loss, nats per answer token of the task.
        rouge_l: %.
        kept: share of the base's right answers that are right still.
        kl: nats per token of the base's answers to general prompts.
        leaks: share of general answers in the style of the task.
        cpu: seconds of the processor beside those of the official recipe on the same machine.
        memory: peak of the training process, bytes.
        size: of what was tuned, bytes.
    """

    loss: list[float]
    rouge_l: list[float]
    kept: list[float]
    kl: list[float]
    leaks: list[float]
    cpu: list[float]
    memory: list[float]
    size: list[float]

    def interval(self, num_known: int) -> tuple[float, float]:
        """Return 95 %, Wilson's, of the mean share that is kept.

        For as many questions as the base had right: seeds answer the same questions, and so add none.
        """
        share = statistics.mean(self.kept)
        return interval(Score(share, num_known, math.sqrt(share * (1 - share) / (num_known - 1))))


def recorded(folder: Path, arms: Sequence[str], seeds: Sequence[int], file: Path) -> dict[str, Any]:
    """Add what was measured in a folder to the record of earlier ones, and keep it.

    A machine is lent for some hours, which is less than all arms take: what one has measured is a file, to
    which the next one adds.
    """
    record: dict[str, Any] = read(file) if file.is_file() else {"arms": {}}
    base = read(folder / "base.json")
    known = [at for at, is_known in enumerate(base["right"]) if is_known]
    record |= {"questions": len(base["right"]), "known": len(known), "base_rouge_l": base["rouge_l"]}
    times = [read(folder / f"official-{seed}" / "cost.json")["cpu_seconds"] for seed in SEEDS
             if (folder / f"official-{seed}" / "cost.json").is_file()]  # fmt: skip
    for arm in arms:
        for seed in seeds:
            run = run_of(folder, arm, seed)
            if (run / "answers.json").is_file():
                found = one_run(run, known, usual=statistics.mean(times))
                record["arms"].setdefault(arm, {})[str(seed)] = found
                record["base_loss"] = read(run / "all_results.json")["baseline_eval_loss"]
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def one_run(run: Path, known: Sequence[int], *, usual: float) -> dict[str, float]:
    """Return the fields of `Result` of one run; ``usual`` is what the official recipe takes, in seconds."""
    answers, results = read(run / "answers.json"), read(run / "all_results.json")
    weights = [file for file in (run / "last").iterdir() if file.suffix == ".safetensors"]
    return {
        "loss": results.get("switched_eval_loss", results["final_eval_loss"]),
        "rouge_l": answers["rouge_l"],
        "kept": sum(answers["right"][at] for at in known) / len(known),
        "kl": answers["kl"],
        "leaks": answers["leaks"],
        "cpu": read(run / "cost.json")["cpu_seconds"] / usual,
        "memory": results["peak_memory_bytes"],
        "size": sum(file.stat().st_size for file in weights),
    }


def report(folder: Path, task: Task, arms: Sequence[str], seeds: Sequence[int], file: Path) -> None:
    """Write the table, the picture beside it and the record that both are made of."""
    record = recorded(folder, arms, seeds, file.with_suffix(".json"))
    found = {
        arm: Result(**{name: [run[name] for run in runs.values()] for name in Result.__annotations__})
        for arm in ARMS
        if (runs := record["arms"].get(arm))
    }
    known = record["known"]
    lines = [
        f"| base | {record['base_loss']:.2f} | {record['base_rouge_l']:.1f} | 100 | | 0 | 0 | | | | |",
        *(table_row(ARMS[arm].title, result, known) for arm, result in found.items()),
    ]
    head = [
        "tuned",
        "eval loss",
        "ROUGE-L",
        "kept (%)",
        "95 % interval",
        "KL",
        "leaks (%)",
        "CPU time",
        "memory",
        "file",
        "seeds",
    ]
    table = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|", *lines]
    more = "" if task is ADS else " with `--adgen`"
    text = f"""# What tuning keeps of the base, by method

glm-tiny on {task.title}, 16 rows a step: `python benchmarks/retention.py train FOLDER`{more}, then
`measure` and `report`.

{known} of {record["questions"]} exam questions are right before tuning; kept: how many of those are right
afterwards. Loss is nats per answer token on the task's validation rows (with a switch, as it decides),
ROUGE-L that of {TASK_ROWS} of them. Values are means over seeds, least and most in brackets; the interval is
that of so many questions. KL is nats per token of the base's answers to the 200 shipped prompts, leaks the
share of answers to these in the style of the task. CPU time is that of the whole run, beside the official
recipe's 200 steps.
"""
    draw(found, file.with_suffix(".png"))
    picture = f"![task loss against what is kept]({file.stem}.png)"
    file.write_text("\n".join([text, *table, "", picture, ""]), encoding="utf-8")


def table_row(title: str, result: Result, num_known: int) -> str:
    """Word one arm."""
    low, high = result.interval(num_known)
    cells = (
        title,
        spread(result.loss, ".3f"),
        spread(result.rouge_l, ".1f"),
        spread([100 * share for share in result.kept], ".1f"),
        f"{100 * low:.1f} to {100 * high:.1f}",
        spread(result.kl, ".2f"),
        spread([100 * share for share in result.leaks], ".1f"),
        f"{statistics.mean(result.cpu):.2f}",
        f"{statistics.mean(result.memory) / 2**20:,.0f} MiB",
        f"{result.size[0] / 2**20:.2f} MiB",
        str(len(result.loss)),
    )
    return "| " + " | ".join(cells) + " |"


def spread(values: Sequence[float], form: str) -> str:
    """Word a mean, and least and most where they differ."""
    ends = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{ends}"


def draw(found: dict[str, Result], file: Path) -> None:
    """Draw task loss against retention: the mean of the seeds, and bars from the least to the most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (arm, result) in enumerate(found.items()):
        shares = [100 * share for share in result.kept]
        axes.errorbar(
            statistics.mean(shares),
            statistics.mean(result.loss),
            xerr=ends(shares),
            yerr=ends(result.loss),
            fmt="osD^v<>"[number % 7],
            markersize=5,
            linewidth=1,
            label=ARMS[arm].title,
        )
    axes.set_xlabel("answers of the base that are right still, %")
    axes.set_ylabel("evaluation loss of the task (nats per answer token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file)


def ends(values: Sequence[float]) -> list[list[float]]:
    """Return how far the least and the most are from the mean, as matplotlib takes them."""
    mean = statistics.mean(values)
    return [[mean - min(values)], [max(values) - mean]]


def read(file: Path) -> Any:
    """Return a measurement."""
    return json.loads(file.read_text(encoding="utf-8"))


def write(file: Path, found: dict[str, Any]) -> None:
    """Keep a measurement."""
    file.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("train", "measure", "report"))
    parser.add_argument("folder", type=Path, help="where runs and measurements lie")
    parser.add_argument("report", type=Path, nargs="?", help="of action report: the Markdown file to write")
    parser.add_argument("--arms", default=",".join(ARMS), help="names of arms, with commas")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--adgen", type=Path, help="folder of ADGEN: tune on it instead of data/ads")
    return parser.parse_args()


def main() -> None:
    """Do what was asked."""
    options: Any = parse_arguments()
    arms, seeds = options.arms.split(","), [int(seed) for seed in options.seeds.split(",")]
    task = ADS if options.adgen is None else adgen(options.adgen.resolve())
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.action == "train":
        train(options.folder, task, arms, seeds)
    elif options.action == "measure":
        measure(options.folder, task, arms, seeds)
    else:
        report(options.folder, task, arms, seeds, options.report)


if __name__ == "__main__":
    main()
