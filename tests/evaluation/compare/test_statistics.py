"""The statistics of a comparison, beside references (statsmodels 0.15, scipy, brute force) and the verdict."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from evaluation.compare.reporting.published import published_drops, why_pairs
from evaluation.compare.settings import GateSettings, SideSettings
from evaluation.compare.statistics.counts import PairCounts, Strata, count_pairs
from evaluation.compare.statistics.drops import compare_outcomes
from evaluation.compare.statistics.gate import judge_drop
from evaluation.compare.statistics.intervals import (
    bootstrap,
    mcnemar,
    min_detectable_drop,
    paired_z,
    score_bounds,
    score_z,
    two_sided_p,
    unpaired_z,
)
from evaluation.metrics import MACRO, Groups, Outcome, Score
from evaluation.statistics.adjusted import holm
from glmtune.errors import ConfigError
from glmtune.models.settings import ModelSettings
from tests.evaluation.compare.cases import outcomes


@pytest.mark.parametrize(
    ("lost", "gained", "p_value", "z"),
    [
        # statsmodels.stats.contingency_tables.mcnemar: exact p-value; root of the uncorrected statistic
        (10, 2, 0.03857421875, 2.309401076758503),
        (121, 77, 0.00216374338612456, 3.1269438398822866),
        (0, 5, 0.0625, -2.23606797749979),
        (30, 30, 1.0, 0.0),
        (700, 560, 8.869232897811296e-05, 3.9440531887330774),
    ],
)
def test_mcnemar_is_that_of_statsmodels(lost, gained, p_value, z):
    counts = PairCounts(both=50, lost=lost, gained=gained, neither=40)
    assert mcnemar(counts) == pytest.approx(p_value, rel=1e-9)
    strata = Strata.micro([counts])
    assert paired_z(strata.drop, strata.discordant_frac, counts.num_samples) == pytest.approx(z)


def test_no_flip_is_no_evidence():
    counts = PairCounts(both=7, neither=3)
    assert mcnemar(counts) == 1.0
    assert paired_z(0.0, 0.0, 10) is None
    assert two_sided_p(None) == 1.0
    assert unpaired_z(Score(1.0, 5, None), Score(1.0, 5, None)) is None


def test_holm_is_that_of_statsmodels():
    # statsmodels.stats.multitest.multipletests(method="holm")
    assert holm([0.01, 0.04, 0.03, 0.005, 0.2, 0.9]) == pytest.approx([0.05, 0.12, 0.12, 0.03, 0.4, 0.9])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("before", "after", "size", "z"),
    [
        # statsmodels.stats.proportion.test_proportions_2indep(method="wald")
        (721, 677, 1346, 1.698251454612803),
        (6385, 6056, 14042, 3.9532885927532364),
    ],
)
def test_unpaired_is_that_of_statsmodels(before, after, size, z):
    assert unpaired_z(Score(before / size, size, None), Score(after / size, size, None)) == pytest.approx(z)


def test_published_mmlu_is_significant_unpaired():
    """Issue: 45.47 → 43.13 on 14,042 questions is z ≈ 3.9."""
    (mmlu,) = (each for each in published_drops() if each.title == "MMLU test")
    assert mmlu.z == pytest.approx(3.95, abs=0.01)
    assert mmlu.p_value < 0.001
    assert "MMLU test: 45.47 → 43.13 on 14,042 questions, z = 3.95 (p < 0.001, significant)" in why_pairs()


def test_published_ceval_is_not_significant_unpaired_but_would_be_paired():
    """Issue: 53.57 → 50.30 on 1,346 questions is z ≈ 1.7; with 15 % discordant answers 3.1."""
    (ceval,) = (each for each in published_drops() if each.title == "C-Eval val")
    assert (ceval.baseline.accuracy, ceval.candidate.accuracy) == (721 / 1346, 677 / 1346)
    assert ceval.z == pytest.approx(1.70, abs=0.01)
    assert ceval.p_value == pytest.approx(0.09, abs=0.005)
    assert ceval.z_if_paired == pytest.approx(3.1, abs=0.05)
    text = why_pairs()
    assert "C-Eval val: 53.57 → 50.30 on 1,346 questions, z = 1.70 (p = 0.09, not significant)" in text
    assert "cancels out in a pair" in text


class TestScoreTest:
    @pytest.mark.parametrize(("lost", "gained", "size"), [(12, 5, 100), (0, 0, 54), (3, 9, 40), (0, 6, 30)])
    @pytest.mark.parametrize("drop", [-0.3, -0.05, 0.0, 0.02, 0.2])
    def test_is_the_restricted_likelihood_found_by_brute_force(self, lost, gained, size, drop):
        """Maximize the likelihood of the three cells under the supposed drop, and standardize by it."""

        def loss(gain_rate: float) -> float:
            cells = [
                (lost, gain_rate + drop),
                (gained, gain_rate),
                (size - lost - gained, 1 - 2 * gain_rate - drop),
            ]
            return -sum(count * math.log(max(rate, 1e-300)) for count, rate in cells if count)

        low, high = max(0.0, -drop), (1 - drop) / 2
        found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12})
        variance = size * (2 * found.x + drop * (1 - drop))
        strata = Strata.micro([PairCounts(both=size - lost - gained, lost=lost, gained=gained)])
        if variance < 1e-6:
            return
        expected = (lost - gained - size * drop) / math.sqrt(variance)
        assert score_z(strata, drop) == pytest.approx(expected, rel=1e-3, abs=1e-6)

    @pytest.mark.parametrize("size", [1, 5, 54, 1000])
    def test_without_flips_the_bound_is_known(self, size):
        """z² / (n + z²), both ways: 5 questions without a flip never make one sure."""
        z = norm.ppf(0.975)
        bounds = score_bounds(Strata.micro([PairCounts(both=size)]), 0.975)
        assert bounds.high == pytest.approx(z**2 / (size + z**2), rel=1e-6)
        assert bounds.low == pytest.approx(-bounds.high, rel=1e-6)

    @pytest.mark.parametrize("counts", [PairCounts(lost=4), PairCounts(gained=4), PairCounts(3, 2, 1, 0)])
    def test_bounds_hold_the_drop_and_stay_possible(self, counts):
        strata = Strata.micro([counts])
        bounds = score_bounds(strata, 0.95)
        assert -1 <= bounds.low <= strata.drop <= bounds.high <= 1

    def test_is_near_the_plain_interval_where_there_is_plenty(self):
        strata = Strata.micro([PairCounts(6000, 1200, 900, 5900)])
        error = math.sqrt((strata.discordant_frac - strata.drop**2) / 14000)
        bounds = score_bounds(strata, 0.95)
        assert bounds.high == pytest.approx(strata.drop + 1.645 * error, abs=1e-4)
        assert bounds.low == pytest.approx(strata.drop - 1.645 * error, abs=1e-4)


class TestBootstrap:
    def test_is_the_bootstrap_over_questions(self):
        """One multinomial draw of the counts has the distribution of questions drawn one by one."""
        counts = PairCounts(40, 20, 8, 32)
        drops = np.repeat([0, 1, -1, 0], counts.cells)
        draws = np.random.default_rng(1).choice(drops, (20_000, 100)).mean(axis=1)
        found = bootstrap(Strata.micro([counts]), confidence=0.95, num_resamples=20_000, seed=0)
        assert [found.drop.low, found.drop.high] == pytest.approx(
            np.percentile(draws, [2.5, 97.5]), abs=0.0101
        )

    def test_of_a_macro_average_stays_within_subjects(self):
        """Two subjects that flip wholly, in opposite directions: nothing varies inside either."""
        opposite = [PairCounts(lost=10), PairCounts(gained=10)]
        found = bootstrap(Strata.macro(opposite), confidence=0.95, num_resamples=500, seed=0)
        assert (found.drop.low, found.drop.high) == (0.0, 0.0)
        pooled = bootstrap(Strata.micro(opposite), confidence=0.95, num_resamples=500, seed=0)
        assert pooled.drop.high > 0.3

    def test_its_spread_is_that_of_a_mean_over_subjects(self):
        subjects = [PairCounts(5, 3, 1, 3), PairCounts(10, 1, 2, 7), PairCounts(2, 2, 2, 9)]
        variance = 0.0
        for each in subjects:
            values = np.repeat([0, 1, -1, 0], each.cells)
            variance += values.var(ddof=1) / len(values) / 9
        found = bootstrap(Strata.macro(subjects), confidence=0.95, num_resamples=20_000, seed=0)
        width = found.drop.high - found.drop.low
        assert width == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.05)

    def test_gives_the_same_figures_every_time(self):
        strata = Strata.micro([PairCounts(40, 20, 8, 32)])
        one, two = (bootstrap(strata, confidence=0.9, num_resamples=200, seed=3) for _ in range(2))
        assert one == two

    def test_retention_is_a_ratio_or_nothing(self):
        found = bootstrap(
            Strata.micro([PairCounts(60, 20, 0, 20)]), confidence=0.95, num_resamples=2000, seed=0
        )
        assert found.retention is not None
        assert found.retention.low < 60 / 80 < found.retention.high
        nothing = Strata.micro([PairCounts(gained=3, neither=7)])
        assert bootstrap(nothing, confidence=0.95, num_resamples=200, seed=0).retention is None


class TestStrata:
    def test_macro_weighs_subjects_alike(self):
        strata = Strata.macro([PairCounts(both=90, lost=10), PairCounts(both=5, gained=5)])
        assert strata.drop == pytest.approx((0.1 - 0.5) / 2)
        assert strata.num_effective <= 110

    def test_single_questions_stand_together(self):
        strata = Strata.macro([PairCounts(both=1), PairCounts(lost=1), PairCounts(2, 0, 0, 2)])
        assert strata.weights == pytest.approx((1 / 3, 2 / 3))
        assert strata.drop == pytest.approx(1 / 3)

    def test_effective_number_of_equal_subjects_is_that_of_the_questions(self):
        strata = Strata.macro([PairCounts(6, 2, 1, 11)] * 10)
        assert strata.num_effective == pytest.approx(200, rel=0.06)
        silent = Strata.macro([PairCounts(both=10), PairCounts(both=90)])
        assert silent.num_effective == pytest.approx(1 / (0.25 / 10 + 0.25 / 90))

    def test_questions_must_match(self):
        with pytest.raises(AssertionError, match="match the questions"):
            count_pairs([Outcome("law", 0, True)], [Outcome("law", 1, True)])


class TestVerdict:
    def judge(self, counts: PairCounts, **gate):
        return judge_drop(Strata.micro([counts]), "micro", GateSettings(**gate))

    def test_within(self):
        verdict = self.judge(PairCounts(6000, 300, 290, 7000))
        assert verdict.outcome == "within"
        assert verdict.upper_pp < 1.0
        assert verdict.p_within < 0.05
        assert verdict.num_needed is None
        assert verdict.sentence().startswith(
            "within tolerance: the drop is +0.07 points, with 95 % confidence below"
        )

    def test_exceeds(self):
        verdict = self.judge(PairCounts(6000, 700, 300, 6000))
        assert verdict.outcome == "exceeds"
        assert verdict.lower_pp > 1.0
        assert verdict.p_exceeds < 0.05
        assert "exceeds tolerance: the drop is +3.08 points, with 95 % confidence above" in verdict.sentence()

    def test_undecided_says_how_many_questions_would_do(self):
        verdict = self.judge(PairCounts(600, 60, 60, 626))
        assert verdict.outcome == "undecided"
        spread = (120 + 2 * 1346 / 1350) / 1346
        assert verdict.num_needed == pytest.approx(spread * (2.4865 / 0.01) ** 2, rel=0.01)
        assert f"About {verdict.num_needed:,} questions (1,346 were asked)" in verdict.sentence()

    def test_that_many_questions_do_decide_in_four_of_five_cases(self):
        needed = self.judge(PairCounts(600, 60, 60, 626)).num_needed
        rates = np.array([600, 60, 60, 626]) / 1346
        draws = np.random.default_rng(0).multinomial(needed, rates, 400)
        outcomes_found = [self.judge(PairCounts(*map(int, draw))).outcome for draw in draws]
        assert 0.74 < outcomes_found.count("within") / 400 < 0.86

    def test_a_drop_equal_to_the_tolerance_can_never_be_told(self):
        verdict = self.judge(PairCounts(500, 30, 20, 450), max_drop_pp=1.0)
        assert verdict.outcome == "undecided"
        assert verdict.num_needed is None
        assert "No number of questions" in verdict.sentence()

    @pytest.mark.parametrize("size", [1, 5, 50])
    def test_few_questions_never_pass(self, size):
        assert self.judge(PairCounts(both=size)).outcome == "undecided"

    def test_a_gain_passes_and_a_sure_tolerance_is_harder(self):
        counts = PairCounts(600, 60, 75, 611)
        assert self.judge(counts, max_drop_pp=1.0).outcome == "within"
        assert self.judge(counts, max_drop_pp=1.0, confidence=0.9999).outcome == "undecided"

    def test_detectable_drop_is_found_in_four_of_five_cases(self):
        strata = Strata.micro([PairCounts(600, 60, 60, 626)])
        drop = min_detectable_drop(strata, 0.95)
        lost = (120 / 1346 + drop) / 2
        draws = np.random.default_rng(0).multinomial(1346, [1 - 120 / 1346, lost, 120 / 1346 - lost], 1000)
        found = sum(
            score_z(Strata.micro([PairCounts(int(d[0]), int(d[1]), int(d[2]))]), 0.0) > 1.645 for d in draws
        )
        assert 0.75 < found / 1000 < 0.85


class TestComparison:
    def compare(self, counts, groups=None, **gate):
        before, after = outcomes(counts)
        return compare_outcomes(before, after, groups or Groups(), GateSettings(num_resamples=500, **gate))

    COUNTS = {"law": PairCounts(20, 6, 1, 13), "art": PairCounts(3, 0, 2, 5), "zoo": PairCounts(1, 8, 0, 1)}  # noqa: RUF012

    def test_all_averages(self):
        found = self.compare(self.COUNTS, Groups(categories={"law": "Hard", "art": "Soft", "zoo": "Soft"}))
        assert found.micro.drop_pp == pytest.approx(100 * 11 / 60)
        assert found.macro.drop_pp == pytest.approx(100 * (5 / 40 - 0.2 + 0.8) / 3)
        assert found.micro.retention == pytest.approx((24 + 3) / (24 + 3 + 14 - 3))
        assert (found.micro.num_lost, found.micro.num_gained) == (14, 3)
        assert found.categories["Soft"].num_samples == 20
        assert found.categories["Soft"].drop_pp == pytest.approx(30.0)
        assert found.subjects["zoo"].p_value == pytest.approx(2 / 2**8)
        assert found.subjects["zoo"].p_holm == pytest.approx(3 * 2 / 2**8)
        hard, soft = found.categories["Hard"], found.categories["Soft"]
        assert soft.p_value < hard.p_value
        assert soft.p_holm == hard.p_holm == pytest.approx(2 * soft.p_value)
        assert found.micro.low_pp < found.micro.drop_pp < found.micro.high_pp
        assert found.micro.p_holm is None

    def test_the_headline_is_judged_unless_another_is_named(self):
        assert self.compare(self.COUNTS).verdict.average == "micro"
        macro = self.compare(self.COUNTS, Groups(headline=MACRO))
        assert macro.verdict.average == "macro"
        assert macro.judged is macro.macro
        assert macro.verdict.drop_pp == pytest.approx(macro.macro.drop_pp)
        named = self.compare(self.COUNTS, Groups(headline=MACRO), average="micro")
        assert named.judged is named.micro

    def test_a_category_is_averaged_as_its_benchmark_says(self):
        groups = Groups(categories=dict.fromkeys(self.COUNTS, "All"), category_average=MACRO)
        found = self.compare(self.COUNTS, groups)
        assert found.categories["All"].drop_pp == pytest.approx(found.macro.drop_pp)

    def test_nothing_right_before_has_no_retention(self):
        found = self.compare({"law": PairCounts(gained=2, neither=8)})
        assert found.micro.retention is found.micro.retention_low is None
        assert found.micro.drop_pp == -20


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_drop_pp": -1}, "`gate.max_drop_pp` is -1, but it must be from 0 to 99"),
        ({"confidence": 1.0}, "`gate.confidence` is 1.0"),
        ({"average": "mikro"}, "`gate.average` is `mikro`, which does not exist. Did you mean `micro`"),
        ({"num_resamples": 3}, "`gate.num_resamples` is 3"),
        ({"seed": -1}, "`gate.seed` is -1"),
    ],
)
def test_gate_settings_are_checked(values, words):
    with pytest.raises(ConfigError, match=words):
        GateSettings(**values)


class TestSides:
    SHARED = ModelSettings(source="chatglm2-6b", dtype="float16", quantization="int8")

    @pytest.mark.parametrize(
        ("side", "expected"),
        [
            ({}, ("chatglm2-6b", "float16", "int8")),
            ({"quantization": "bf16"}, ("chatglm2-6b", "bfloat16", None)),
            ({"quantization": "none"}, ("chatglm2-6b", "float16", None)),
            ({"quantization": "int4", "dtype": "float32"}, ("chatglm2-6b", "float32", "int4")),
            ({"source": "mine/q4", "quantization": "fp32"}, ("mine/q4", "float32", None)),
        ],
    )
    def test_a_side_changes_what_it_names(self, side, expected):
        model = SideSettings(**side).applied_to(self.SHARED)
        assert (model.source, model.dtype, model.method) == expected

    def test_quantization_bit_gives_way(self):
        shared = ModelSettings(quantization_bit=8)
        assert SideSettings(quantization="int4").applied_to(shared).method == "int4"

    @pytest.mark.parametrize(
        ("side", "words"),
        [
            ({"prefix_path": "a", "adapter_path": "b"}, "`prefix_path` is `a` and `adapter_path` `b`"),
            (
                {"quantization": "bf16", "dtype": "float32"},
                "`quantization` is `bf16` and `dtype` is `float32`",
            ),
        ],
    )
    def test_contradictions_are_refused(self, side, words):
        with pytest.raises(ConfigError, match=words):
            SideSettings(**side)
