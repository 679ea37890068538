"""The stream of an answer: it ends with `Finished`, with an error, or when nobody reads it any more."""

from __future__ import annotations

import pytest

from glmtune.errors import GlmtuneError
from glmtune.inference.requests.chat import Finished, TextDelta
from glmtune.inference.requests.sampling import Sampling
from glmtune.interactive.answerer import AnswerStream, chosen_fields


def test_a_stream_ends_by_itself_and_is_not_cancelled() -> None:
    cancelled: list[int] = []
    stream = AnswerStream(lambda: cancelled.append(1))
    events = [TextDelta("a"), Finished("stop", 1, 2)]
    for event in (*events, TextDelta("late")):
        stream.put(event)
    assert list(stream) == events
    assert cancelled == []


def test_leaving_the_loop_or_stopping_cancels() -> None:
    cancelled: list[str] = []
    stream = AnswerStream(lambda: cancelled.append("left"))
    stream.put(TextDelta("a"))
    for _ in stream:
        break
    assert cancelled == ["left"]
    stream = AnswerStream(lambda: cancelled.append("stopped"))
    stream.put(TextDelta("a"))
    stream.stop()
    assert list(stream) == [TextDelta("a"), Finished("cancelled", 0, 0)]
    assert cancelled == ["left", "stopped"]


@pytest.mark.parametrize("last", [GlmtuneError("no memory"), Finished("failed", 1, 1, error="no memory")])
def test_an_answer_that_failed_is_an_error_after_what_came(last: GlmtuneError | Finished) -> None:
    stream = AnswerStream()
    stream.put(TextDelta("a"))
    stream.put(last)
    events = iter(stream)
    assert next(events) == TextDelta("a")
    with pytest.raises(GlmtuneError, match="no memory"):
        next(events)


def test_the_fields_that_were_chosen() -> None:
    assert chosen_fields({"temperature": 0.0}) == {"temperature": 0.0}
    assert chosen_fields(Sampling(seed=1)) == {"temperature": 0.0, "top_p": 1.0, "seed": 1}
