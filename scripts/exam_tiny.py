"""Let a model sit glm-tiny's exam and print its scores: ``python scripts/exam_tiny.py [SOURCE] [ROWS]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from glmtune.inference.predict.generate import generate_ids
from glmtune.inference.settings import GenerationSettings
from glmtune.models.load import load_official
from glmtune.models.releases.source import resolve_source
from glmtune.models.templates.renderer import template_for
from glmtune.models.tokenizers.load import load_tokenizer_folder
from glmtune.tiny.corpus.sample import Sample
from glmtune.tiny.exam import is_right, take


def main(source: str = "glm-tiny", per_skill: int = 100) -> None:
    """Answer greedily and print one line per group.

    Args:
        source: model to examine.
        per_skill: rows of each skill.
    """
    model = load_official(source)
    tokenizer = load_tokenizer_folder(resolve_source(source), model.family)
    template = template_for(tokenizer)
    settings = GenerationSettings(max_new_tokens=200, batch_size=64)

    def answer(samples: Sequence[Sample]) -> list[str]:
        prompts = [template.encode_prompt(tokenizer, sample.messages[:-1]) for sample in samples]
        answers = [""] * len(prompts)
        stop = template.stop_ids(tokenizer)
        for done in generate_ids(model, prompts, settings, stop_ids=stop, pad_id=tokenizer.pad_token_id or 0):
            answers[done.index] = template.clean_answer(tokenizer.decode(list(done.token_ids)))
        if "--show" in sys.argv:
            for sample, text in zip(samples, answers, strict=True):
                mark = "ok  " if is_right(sample, text) else "MISS"
                print(f"{mark} {sample.skill} | {sample.messages[-2].content!r} -> {text!r} [{sample.key}]")
        return answers

    scores, mentioned = take(answer, per_skill=per_skill)
    for score in scores:
        print(f"{score.group:32s} n={score.num_samples:4d}  {100 * score.accuracy:5.1f} %")
    print(f"{'ads, attribute values mentioned':32s} n={per_skill:4d}  {100 * mentioned:5.1f} %")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    main(*words[:1], **({"per_skill": int(words[1])} if len(words) > 1 else {}))
