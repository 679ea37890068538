"""Which runs may be compared: the same questions, asked in the same way, read by the same rule."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from evaluation.compare.pairing.runs import JudgedAnswer, Run
from evaluation.running.fingerprint import tuned_words
from glmtune.errors import ConfigError, DataError

# What two fingerprints must share, under the word that an error uses. The model may differ in everything,
# and so may the length of its context: where that changed a prompt, the answers' own prompt hashes say so.
KINDS = {
    "data": ("benchmark", "split", "num_samples", "data_hash"),
    "prompts": ("prompt_hash", "num_fewshot", "own_prompt"),
    "protocol": ("protocol_version", "max_new_tokens", "stop", "do_sample", "rule", "rule_version"),
}
WAYS_OUT = {
    "data": "Evaluate both on the same files, subjects and `benchmark.limit`.",
    "prompts": (
        "Evaluate both with the same `is_chat`, `benchmark.num_fewshot`, `benchmark.system` and"
        " `benchmark.template`."
    ),
    "protocol": (
        "Evaluate both with the same `protocol` and `benchmark.max_new_tokens`, by the same version of"
        " glmtune (the same command reads answers that exist anew, without asking again)."
    ),
}


@dataclass(frozen=True)
class Pair:
    """Two runs that answered the same questions.

    Attributes:
        baseline: the run a drop is counted from.
        candidate: the run that is judged.
        rows: both answers to each question, in the order of the data.
    """

    baseline: Run
    candidate: Run
    rows: tuple[tuple[JudgedAnswer, JudgedAnswer], ...]

    @property
    def benchmark(self) -> str:
        """Name of the benchmark, such as ``ceval``."""
        return str(self.baseline.results["benchmark"])

    @property
    def what(self) -> str:
        """The benchmark and its protocol, such as ``C-Eval val, zero_shot_cot``."""
        return self.title.removeprefix("OWN ").removeprefix("SAMPLE ").removeprefix("PARTIAL ")

    @property
    def title(self) -> str:
        """The benchmark and its protocol, marked SAMPLE or PARTIAL where that is so."""
        results = self.baseline.results
        if model := results.get("model"):
            return str(results["title"]).removesuffix(f": {model}")
        return str(results["title"]).rpartition(": ")[0]

    @property
    def measure(self) -> str:
        """What the averages are of."""
        return "mean grade" if self.baseline.results.get("is_graded") else "accuracy"

    @property
    def is_comparable(self) -> bool:
        """Whether published figures may stand beside this pair."""
        results = self.baseline.results
        is_own = str(results["title"]).startswith("OWN ")
        # Of several drawn answers each is a run that can be compared; published are the likeliest ones.
        is_drawn = self.baseline.fingerprint["decoding"].get("do_sample", False)
        differs = results["is_sample_set"] or results["is_partial"] or results.get("own_prompt") or is_drawn
        return not (differs or is_own)


def match(baseline: Run, candidate: Run) -> Pair:
    """Pair two runs question by question.

    Args:
        baseline: a finished run.
        candidate: another one.

    Raises:
        ConfigError: both are the same run.
        DataError: they differ in data, prompts or protocol; every difference is named.
    """
    check_comparable(baseline, candidate)
    theirs = {row.answer.key: row for row in candidate.rows}
    return Pair(baseline, candidate, tuple((row, theirs[row.answer.key]) for row in baseline.rows))


def check_comparable(baseline: Run, candidate: Run, *, but: Collection[str] = ()) -> None:
    """Refuse two runs that were asked other questions, or in another way.

    Args:
        baseline: a finished run.
        candidate: another one.
        but: what they may differ in, of the names in ``KINDS``.

    Raises:
        ConfigError: both are the same run.
        DataError: they differ in data, prompts or protocol; every difference is named.
    """
    if baseline.folder.resolve() == candidate.folder.resolve():
        raise ConfigError(
            f"Baseline and candidate are the same run, `{baseline.folder}`. Name two different ones."
        )
    before, after = _comparable_part(baseline), _comparable_part(candidate)
    problems: list[str] = []
    ways_out: list[str] = []
    for kind, names in KINDS.items():
        differing = [name for name in names if before.get(name) != after.get(name) and name not in but]
        if differing:
            shown = "; ".join(f"{name}: {_show(before, name)} and {_show(after, name)}" for name in differing)
            problems.append(f"{kind} ({shown})")
            ways_out.append(WAYS_OUT[kind])
    if problems:
        raise DataError(
            f"it cannot be compared with {candidate.folder}: they differ in {', in '.join(problems)}."
            f" {' '.join(ways_out)}",
            path=baseline.folder,
        ).see("not-comparable")
    # The fingerprint hashes whole prompts; what a model was asked may be shorter, so every answer is checked
    # too.
    _refuse_other_questions(baseline, candidate)


def _comparable_part(run: Run) -> Mapping[str, Any]:
    # Results from before rules had versions were read by the first.
    version = run.results.get("rule_version", 1)
    return {
        **run.fingerprint,
        **run.fingerprint["decoding"],
        "rule": run.rule,
        "rule_version": version,
    }


def _show(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    return str(value)[:12] if name.endswith("_hash") else json.dumps(value, ensure_ascii=False)


def _refuse_other_questions(baseline: Run, candidate: Run) -> None:
    mine = {row.answer.key: row.answer for row in baseline.rows}
    theirs = {row.answer.key: row.answer for row in candidate.rows}
    num_choices = [
        {len(answer.choice_logprobs) for answer in answers.values() if answer.choice_logprobs is not None}
        for answers in (mine, theirs)
    ]
    if all(num_choices) and num_choices[0] != num_choices[1]:
        raise DataError(
            f"it cannot be compared with {candidate.folder}: `choice_logprobs` has {max(num_choices[0])} and"
            f" {max(num_choices[1])} values. {WAYS_OUT['protocol']}",
            path=baseline.folder,
        )
    alone = [*(mine.keys() - theirs.keys()), *(theirs.keys() - mine.keys())]
    if alone:
        subject, index = min(alone)
        raise DataError(
            f"it cannot be compared with {candidate.folder}: {len(alone)} questions have an answer in one of"
            f" them alone (first: `{subject}` {index}). {WAYS_OUT['data']}",
            path=baseline.folder,
        )
    asked_otherwise = [
        key
        for key, answer in mine.items()
        if answer.prompt_hash and theirs[key].prompt_hash and answer.prompt_hash != theirs[key].prompt_hash
    ]
    if asked_otherwise:
        (subject, index), count = asked_otherwise[0], len(asked_otherwise)
        shots = [answers[asked_otherwise[0]].num_fewshot for answers in (mine, theirs)]
        raise DataError(
            f"it cannot be compared with {candidate.folder}: {count} questions were asked with another prompt"
            f" (first: `{subject}` {index}, with {shots[0]} and {shots[1]} exemplars). A smaller context"
            " shortens prompts: ask both with fewer exemplars (`benchmark.num_fewshot`).",
            path=baseline.folder,
        )


def labels(baseline: Run, candidate: Run) -> tuple[str, str]:
    """Return short names of both runs: by all that they differ in.

    Args:
        baseline: a run.
        candidate: another one.
    """
    before, after = baseline.model, candidate.model
    named = [(name(before), name(after)) for name in (_precision, _tuning, _base, _engine)]
    # Two prefixes may have been in the same folder one after the other.
    if before["adapter"] != after["adapter"] and named[1][0] == named[1][1]:
        named[1] = (_with_hash(before), _with_hash(after))
    differing = [pair for pair in named if pair[0] != pair[1] and all(pair)]
    if not differing:
        return "baseline", "candidate"
    first, second = zip(*differing, strict=True)
    return ", ".join(first), ", ".join(second)


def _precision(model: Mapping[str, Any]) -> str:
    """Write the type of the weights as tables do.

    >>> _precision({"quantization": "none", "dtype": "bfloat16"}), _precision({"quantization": "int4-g32"})
    ('BF16', 'INT4-G32')
    """
    quantization = str(model["quantization"])
    if quantization != "none":
        return quantization.upper()
    return str(model["dtype"]).replace("bfloat", "BF").replace("float", "FP").upper()


def _tuning(model: Mapping[str, Any]) -> str:
    return tuned_words(model) or "base"


def _with_hash(model: Mapping[str, Any]) -> str:
    return f"{tuned_words(model)} ({str(model['adapter'])[:8]})"


def _base(model: Mapping[str, Any]) -> str:
    return str(model["name"])


def _engine(model: Mapping[str, Any]) -> str:
    return str(model["engine"])


def differences(baseline: Run, candidate: Run) -> list[tuple[str, str, str]]:
    """Return what the models differ in: name, value in the baseline, value in the candidate.

    Args:
        baseline: a run.
        candidate: another one.
    """
    before, after = baseline.model, candidate.model
    found = [
        (name, str(before.get(name)), str(after.get(name)))
        for name in before
        if before.get(name) != after.get(name)
    ]
    contexts = [run.fingerprint["decoding"].get("max_context_tokens") for run in (baseline, candidate)]
    if contexts[0] != contexts[1]:
        found.append(("max_context_tokens", str(contexts[0]), str(contexts[1])))
    return found
