"""Shifts of probabilities, margins and texts, from the answers of two runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from evaluation.answer import Answer
from evaluation.compare.pairing.match import Pair, match
from evaluation.compare.pairing.runs import read_run
from evaluation.compare.settings import GateSettings
from evaluation.compare.statistics.perplexity import compare_losses, read_text
from evaluation.compare.statistics.sensitivity import first_divergence, measure
from evaluation.sample import WindowLoss
from glmtune.errors import ConfigError, DataError
from tests.evaluation.compare.cases import INT4, write_run
from tests.evaluation.doubles import IDENTITY, make_task

BEFORE = [(0.60, 0.20, 0.10, 0.05), (0.30, 0.29, 0.20, 0.11), (0.05, 0.05, 0.80, 0.05)]
AFTER = [(0.50, 0.25, 0.10, 0.05), (0.28, 0.32, 0.20, 0.10), (0.05, 0.06, 0.80, 0.05)]


def pair_of(tmp_path, kind: str, before, after) -> Pair:
    task = make_task(kind, sizes={"law": len(before)})
    runs = [
        write_run(tmp_path / name, task, identity, answer=lambda place, _, rows=rows: rows[place])
        for name, identity, rows in (("a", IDENTITY, before), ("b", INT4, after))
    ]
    return match(*map(read_run, runs))


def scored(rows) -> list[Answer]:
    return [Answer("law", place, choice_logprobs=tuple(map(math.log, row))) for place, row in enumerate(rows)]


def written(texts) -> list[Answer]:
    return [Answer("law", place, completion=text, stop_reason="eos") for place, text in enumerate(texts)]


class TestChoices:
    def test_divergences_are_those_of_scipy(self, tmp_path):
        shift = measure(pair_of(tmp_path, "choices", scored(BEFORE), scored(AFTER))).choices
        js = [jensenshannon(one, other) ** 2 for one, other in zip(BEFORE, AFTER, strict=True)]
        kl = [entropy(one, other) for one, other in zip(BEFORE, AFTER, strict=True)]
        assert shift is not None
        assert shift.js_nats.mean == pytest.approx(np.mean(js))
        assert shift.js_nats.largest == pytest.approx(max(js))
        assert shift.kl_nats.median == pytest.approx(np.median(kl))
        assert shift.kl_nats.p95 == pytest.approx(np.percentile(kl, 95))

    def test_margins_and_flips(self, tmp_path):
        """Gold answers are A, B, C: the second question flips from A to B, which is right."""
        shift = measure(pair_of(tmp_path, "choices", scored(BEFORE), scored(AFTER))).choices
        assert shift is not None
        assert shift.num_samples == 3
        assert shift.num_changed == 1
        first = shift.margins[0]
        assert (first.num_samples, first.num_candidate, first.num_changed) == (1, 1, 1)
        assert (first.num_lost, first.num_gained) == (0, 1)
        assert [each.num_samples for each in shift.margins] == [1, 0, 0, 0, 1, 0, 0, 1, 0, 0]
        margin = (0.6 - 0.2) / 0.95
        assert shift.mean_margin_baseline == pytest.approx((margin + 0.01 / 0.9 + 0.75 / 0.95) / 3)

    def test_a_sure_choice_lies_in_the_last_bin(self, tmp_path):
        sure = [Answer("law", 0, choice_logprobs=(0.0, -100.0, -100.0, -100.0))]
        shift = measure(pair_of(tmp_path, "choices", sure, sure)).choices
        assert shift is not None
        assert shift.margins[-1].num_samples == 1
        assert shift.js_nats.mean == 0.0

    def test_choices_that_a_server_left_out_stay_finite(self, tmp_path):
        before = [Answer("law", 0, choice_logprobs=(-0.1, -3.0, -4.0, -5.0))]
        after = [Answer("law", 0, choice_logprobs=(-0.1, -math.inf, -math.inf, -math.inf))]
        shift = measure(pair_of(tmp_path, "choices", before, after)).choices
        assert shift is not None
        assert 0 < shift.kl_nats.mean < 5
        assert 0 < shift.js_nats.mean < math.log(2)

    def test_texts_have_none(self, tmp_path):
        assert measure(pair_of(tmp_path, "generate", written(["A"]), written(["A"]))).choices is None


class TestTexts:
    def test_where_they_part(self, tmp_path):
        before = written(["so A", "so it is B", "well: C", "D"])
        after = written(["so A", "so I say B", "welp: B", "D then D"])
        shift = measure(pair_of(tmp_path, "generate", before, after)).texts
        assert shift is not None
        assert (shift.num_samples, shift.num_identical, shift.num_same_answer) == (4, 1, 2)
        assert shift.median_chars == 3
        assert (shift.first_quartile_chars, shift.third_quartile_chars) == (2, 3)
        assert shift.median_length_chars == 7

    def test_identical_texts_part_nowhere(self, tmp_path):
        shift = measure(pair_of(tmp_path, "generate", written(["A"]), written(["A"]))).texts
        assert shift is not None
        assert shift.num_identical == 1
        assert shift.median_chars is shift.median_length_chars is None

    def test_scores_have_none(self, tmp_path):
        assert measure(pair_of(tmp_path, "choices", scored(BEFORE), scored(BEFORE))).texts is None

    @pytest.mark.parametrize(
        ("one", "other", "place"), [("", "a", 0), ("ab", "ab", None), ("你好", "你们", 1)]
    )
    def test_first_divergence(self, one, other, place):
        assert first_divergence(one, other) == place


class TestPerplexity:
    def test_is_weighed_by_tokens(self):
        before = [WindowLoss(10, 20.0), WindowLoss(5, 5.0)]
        after = [WindowLoss(10, 22.0), WindowLoss(5, 6.0)]
        found = compare_losses("text", before, after, GateSettings())
        assert found.num_tokens == 15
        assert found.baseline == pytest.approx(math.exp(25 / 15))
        assert found.candidate == pytest.approx(math.exp(28 / 15))
        assert found.change_nats == pytest.approx(0.2)
        assert (found.low_nats, found.high_nats) == pytest.approx((0.2, 0.2))

    def test_windows_that_agree_make_one_sure(self):
        before = [WindowLoss(10, 20.0)] * 40
        noisy = [WindowLoss(10, 20.0 + (-1) ** place) for place in range(40)]
        found = compare_losses("text", before, noisy, GateSettings())
        assert found.low_nats is not None
        assert found.high_nats is not None
        assert found.low_nats < 0 < found.high_nats
        assert found.high_nats == pytest.approx(0.1 * 1.96 / math.sqrt(40), rel=0.1)

    def test_a_single_window_has_no_interval(self):
        found = compare_losses("text", [WindowLoss(10, 20.0)], [WindowLoss(10, 21.0)], GateSettings())
        assert found.low_nats is found.high_nats is None

    def test_other_tokenizers_are_refused(self):
        with pytest.raises(DataError, match="cut it into 10 and 12 tokens"):
            compare_losses("text", [WindowLoss(10, 1.0)], [WindowLoss(12, 1.0)], GateSettings())

    def test_files_are_checked(self, tmp_path):
        with pytest.raises(ConfigError, match=r"`text_file` is `.*none.txt`, but it cannot be read"):
            read_text(str(tmp_path / "none.txt"))
        (tmp_path / "empty.txt").write_text(" \n")
        with pytest.raises(DataError, match="it is empty"):
            read_text(str(tmp_path / "empty.txt"))
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
        with pytest.raises(DataError, match="it must be UTF-8, but byte 3 is not"):
            read_text(str(tmp_path / "latin.txt"))
