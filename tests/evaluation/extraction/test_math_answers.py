"""Boxes, typography, and formulas that are equal in value."""

from __future__ import annotations

import pytest

from evaluation.extraction import equality, math_answers
from evaluation.sample import Sample
from glmtune.errors import MissingExtraError


def gold(answer: str) -> Sample:
    return Sample("math500", "algebra", 0, "What is it?", answer=answer)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so $x=\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{3} and then \boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        (r"\boxed{5} but \boxed{6", "5"),
        (r"\boxed{}", None),
        ("no box", None),
        (r"\boxed{" * 50_000, None),
    ],
    ids=["nested", "last", "fbox", "open", "empty", "none", "many open"],
)
def test_boxes(text: str, found: str | None) -> None:
    assert math_answers.boxed(text, gold("1")) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is 12.", "12"),
        (r"The final answer is $\frac{2}{3}$.", r"\frac{2}{3}"),
        ("**Answer:** $x^2$", "x^2"),
        ("Final Answer: The final answer is $14$. I hope it is correct.", "14"),
        ("the answer is 3.5 because it is", "3.5 because it is"),
        (r"answer is 3, so \boxed{4}", "4"),
        ("I give up", None),
    ],
)
def test_what_follows_the_answer_is(text: str, found: str | None) -> None:
    assert math_answers.loose(text, gold("1")) == found


def test_the_form_of_the_exemplars() -> None:
    said = "Adding gives 4.\nFinal Answer: The final answer is $4$. I hope it is correct.\n\nProblem:\nMore"
    assert math_answers.minerva(said, gold("4")) == "4"
    assert math_answers.minerva("It is 4.", gold("4")) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\dfrac{1}{2}", r"\frac12"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        ("10,080", "10080"),
        (r"1{,}080", "1080"),
        (r"90^\circ", "90"),
        (r"\text{Evelyn}", "Evelyn"),
        ("x = 5", "5"),
        (r"\$18", "18"),
        (r"50\%", "50"),
    ],
)
def test_typography(one: str, other: str) -> None:
    assert math_answers.is_the_same_text(one, gold(other))


def test_texts_that_differ() -> None:
    assert not math_answers.is_the_same_text("2", gold("3"))
    assert not math_answers.is_the_same_text("y=2x", gold("2"))


class TestFormulas:
    """What a computer algebra says; the child process of `equality` does it."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("math_verify")

    @pytest.mark.parametrize(
        ("answer", "key", "same"),
        [
            ("0.5", r"\frac{1}{2}", True),
            (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
            (r"x^2+2x+1", r"(x+1)^2", True),
            (r"\{2, 1\}", r"\{1, 2\}", True),
            (r"(1, 2)", r"(2, 1)", False),
            (r"[2,5)", r"[2,5]", False),
            ("3", "4", False),
            (r"9\pi", r"3\pi", False),
            ("", "4", False),
            (r"\frac{1}{", "4", False),
        ],
    )
    def test_values(self, answer: str, key: str, same: bool) -> None:
        assert math_answers.is_the_same_formula(answer, gold(key)) is same

    def test_a_formula_that_is_too_much_is_ended_and_the_next_one_compared(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert math_answers.is_the_same_formula("0.25", gold(r"\frac{1}{4}"))
        monkeypatch.setattr(equality, "SECONDS", 2.0)
        found = math_answers.is_the_same_formula(r"9^{9^{9^{9^{9}}}}", gold(r"9^{9^{9^{9^{8}}}}"))
        assert found is None, "unknown is not the same as different"
        assert math_answers.is_the_same_formula("0.125", gold(r"\frac{1}{8}"))

    def test_what_took_too_long_is_not_remembered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        comparer = equality._Comparer()
        monkeypatch.setattr(equality, "_comparer", comparer)
        assert equality.are_equal("7", "7.0") is True
        with monkeypatch.context() as hurried:
            hurried.setattr(equality, "SECONDS", 0.0)
            assert equality.are_equal("5", "5.0") is None
        assert equality.are_equal("5", "5.0") is True, "asked anew, by a new process"
        monkeypatch.setattr(comparer, "ask", None)
        assert equality.are_equal("5", "5.0") is True, "remembered once it is known"
        comparer.end()

    def test_a_lack_of_memory_is_unknown_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            equality,
            "_CHILD",
            equality._CHILD.replace("def read(formula):", "def read(formula):\n    raise MemoryError"),
        )
        comparer = equality._Comparer()
        monkeypatch.setattr(equality, "_comparer", comparer)
        assert equality.are_equal("11", "11.0") is None
        comparer.end()

    def test_an_interrupt_leaves_no_reply_for_the_next_pair(self, monkeypatch: pytest.MonkeyPatch) -> None:
        comparer = equality._Comparer()
        assert comparer.ask("1", "1.0")

        def interrupted(timeout: float) -> str:
            raise KeyboardInterrupt

        monkeypatch.setattr(comparer._replies, "get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            comparer.ask("2", "2.0")
        assert not comparer.ask("3", "4"), "not the reply to the pair before"
        comparer.end()

    def test_a_lower_bound_of_memory_that_holds_already_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        resource = pytest.importorskip("resource")
        bound = 3 << 30
        lower = f"import resource\nresource.setrlimit(resource.RLIMIT_AS, ({bound}, {bound}))\n"
        monkeypatch.setattr(equality, "_CHILD", lower + equality._CHILD)
        before = resource.getrlimit(resource.RLIMIT_AS)
        comparer = equality._Comparer()
        assert comparer.ask("1", "1.0")
        comparer.end()
        assert resource.getrlimit(resource.RLIMIT_AS) == before

    @pytest.mark.parametrize(
        "text",
        [
            "__import__('os').system('touch {path}')",
            "$__import__('pathlib').Path('{path}').touch()$",
            r"\text{{__import__('os').mkdir('{path}')}}",
        ],
    )
    def test_nothing_that_was_written_is_run(self, text: str, tmp_path) -> None:
        path = tmp_path / "made"
        assert not math_answers.is_the_same_formula(text.format(path=path), gold("4"))
        assert not path.exists()


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"glmtune\[math\]"):
        equality.are_equal("1", "2")
