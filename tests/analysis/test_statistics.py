import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import integrate, stats

from mrla.analysis.statistics import PairedDifference, compare_arms, holm, summary

PLAIN = [0.9441, 0.9513, 0.9467, 0.9402, 0.9498]
LIGHT = [0.9502, 0.9533, 0.9511, 0.9479, 0.9522]
DEPTHWISE = [0.9460, 0.9497, 0.9480, 0.9391, 0.9511]


def compare_two(arm, baseline, **options) -> PairedDifference:
    return compare_arms({"plain": baseline, "light": arm}, baseline="plain", **options)["light"]


def exact_power(noncentrality: float, degrees: int, alpha: float) -> float:
    """Power of the two-sided t test by integrating the normal law over the law of the standard deviation."""
    critical = stats.t.isf(alpha / 2, degrees)

    def given_sd(root: float):
        edge = critical * root / math.sqrt(degrees)
        return stats.chi.pdf(root, degrees) * (
            stats.norm.sf(edge - noncentrality) + stats.norm.cdf(-edge - noncentrality)
        )

    return float(integrate.quad(given_sd, 0, float(stats.chi.isf(1e-13, degrees)), epsabs=1e-11)[0])


def test_agrees_with_scipy():
    result = compare_two(LIGHT, PLAIN)
    expected = stats.ttest_rel(LIGHT, PLAIN)
    interval = expected.confidence_interval(0.95)
    assert result.p_value == pytest.approx(expected.pvalue, rel=1e-10)  # pyright: ignore[reportAttributeAccessIssue]
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), rel=1e-10)
    assert result.p_holm == result.p_value
    assert result.seeds == 5
    narrow = compare_two(LIGHT, PLAIN, alpha=0.2)
    assert narrow.low == pytest.approx(expected.confidence_interval(0.8).low, rel=1e-10)


def test_by_hand():
    # Differences 1, 2, 3 points: mean 2, sd 1, t = 2 sqrt 3. With two degrees of freedom Student's law has a closed
    # form: p = 1 - t / sqrt(2 + t^2), and the 0.975 quantile is 0.95 sqrt(2 / (1 - 0.95^2)) = 4.302653.
    result = compare_two([0.51, 0.62, 0.73], [0.50, 0.60, 0.70])
    assert result.mean == pytest.approx(0.02)
    assert result.sd == pytest.approx(0.01)
    assert result.p_value == pytest.approx(1 - math.sqrt(12 / 14))
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) * 0.01 / math.sqrt(3)
    assert (result.low, result.high) == pytest.approx((0.02 - half, 0.02 + half))
    assert result.verdict == "not resolved"


@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 38])
@pytest.mark.parametrize(("alpha", "power"), [(0.05, 0.8), (0.001, 0.9)])
def test_detectable_has_the_power_it_claims(seeds, alpha, power):
    scores = np.linspace(0.5, 0.6, seeds)
    result = compare_two(scores + 0.01 * np.arange(seeds) / seeds, scores, alpha=alpha, power=power)
    assert result.detectable is not None
    assert result.sd is not None
    noncentrality = result.detectable * math.sqrt(seeds) / result.sd
    assert exact_power(noncentrality, seeds - 1, alpha) == pytest.approx(power, abs=1e-7)


def test_detectable_by_simulation():
    result, draws = compare_two(LIGHT, PLAIN), 4000
    assert result.detectable is not None
    assert result.sd is not None
    samples = np.random.default_rng(0).normal(result.detectable, result.sd, (draws, 5))
    shown = (stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05).mean()  # pyright: ignore[reportAttributeAccessIssue]
    assert shown == pytest.approx(0.8, abs=3 * math.sqrt(0.8 * 0.2 / draws))


def test_false_positives_under_the_null():
    rng, draws = np.random.default_rng(1), 2000
    shared = rng.normal(0.95, 0.01, (draws, 1, 5))
    scores = shared + rng.normal(0, 0.003, (draws, 2, 5))
    results = [compare_two(arm, plain) for plain, arm in scores]
    rate = np.mean([result.verdict != "not resolved" for result in results])
    covered = np.mean(
        [result.low is not None and result.high is not None and result.low <= 0 <= result.high for result in results]
    )
    assert rate == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / draws))
    assert covered == 1 - rate


def test_false_positives_over_four_arms():
    rng, draws = np.random.default_rng(2), 1000
    scores = rng.normal(0.95, 0.003, (draws, 5, 5))
    wrong = 0
    for draw in scores:
        results = compare_arms(dict(zip("abcde", draw, strict=True)), baseline="a")
        wrong += any(result.verdict != "not resolved" for result in results.values())
    assert wrong / draws < 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


def test_holm_published_example():
    # The worked example of Wikipedia's "Holm-Bonferroni method", as adjusted by R's p.adjust(method="holm").
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_rules():
    assert holm([]) == []
    assert holm([0.3]) == [0.3]
    assert holm([0.9, 0.6, 0.8]) == [1.0, 1.0, 1.0]
    assert holm([0.02, 0.02]) == [0.04, 0.04]
    p_values = np.random.default_rng(0).uniform(size=20) ** 3
    adjusted = np.asarray(holm(p_values.tolist()))
    order = np.argsort(p_values)
    assert all(low <= high for low, high in pairwise(adjusted[order]))
    assert (adjusted >= p_values).all()
    assert (adjusted <= np.minimum(1, 20 * p_values)).all()
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1: got"):
            holm([0.5, bad])


def test_holm_over_the_arms():
    results = compare_arms({"dw": DEPTHWISE, "plain": PLAIN, "light": LIGHT}, baseline="plain")
    assert list(results) == ["dw", "light"]
    p_values = [result.p_value for result in results.values() if result.p_value is not None]
    assert [result.p_holm for result in results.values()] == holm(p_values)
    assert results["light"].p_holm == pytest.approx(2 * p_values[1])
    assert results["light"].low == compare_two(LIGHT, PLAIN).low


def test_order_of_seeds_does_not_matter():
    first = compare_two(LIGHT, PLAIN)
    order = [3, 0, 4, 1, 2]
    second = compare_two([LIGHT[i] for i in order], [PLAIN[i] for i in order])
    assert first.reason == second.reason
    for name in ("mean", "sd", "low", "high", "p_value", "detectable"):
        assert getattr(first, name) == pytest.approx(getattr(second, name), rel=1e-9)
    unpaired = compare_two([LIGHT[i] for i in order], PLAIN)
    assert unpaired.p_value != pytest.approx(first.p_value, rel=0.1)


def test_swapping_flips_the_sign():
    there, back = compare_two(LIGHT, PLAIN), compare_two(PLAIN, LIGHT)
    assert back.mean == -there.mean
    assert there.low is not None
    assert there.high is not None
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert back.p_value == pytest.approx(there.p_value)
    assert back.detectable == pytest.approx(there.detectable)
    assert (there.verdict, back.verdict) == ("better", "worse")


def test_scaling():
    whole = compare_two(LIGHT, PLAIN)
    half = compare_two([x / 2 for x in LIGHT], [x / 2 for x in PLAIN])
    for name in ("mean", "sd", "low", "high", "detectable"):
        assert 2 * getattr(half, name) == pytest.approx(getattr(whole, name))
    assert half.p_value == pytest.approx(whole.p_value)


def test_lower_is_better():
    higher, lower = compare_two(LIGHT, PLAIN), compare_two(LIGHT, PLAIN, higher_is_better=False)
    assert (higher.verdict, lower.verdict) == ("better", "worse")
    assert higher.mean == lower.mean
    errors = compare_two([1 - x for x in LIGHT], [1 - x for x in PLAIN], higher_is_better=False)
    assert errors.verdict == "better"
    assert errors.mean == pytest.approx(-higher.mean)
    assert errors.reason == higher.reason


def test_reasons_read_well():
    assert compare_two(LIGHT, PLAIN).reason == (
        "light is better than plain by 0.45 points (95 % interval 0.15 to 0.75, 5 seeds)"
    )
    assert compare_two(PLAIN, LIGHT).reason == (
        "light is worse than plain by 0.45 points (95 % interval 0.15 to 0.75, 5 seeds)"
    )
    assert compare_two(DEPTHWISE, PLAIN).reason == (
        "not resolved: the difference of +0.04 points (95 % interval -0.16 to 0.23, 5 seeds) may be chance; "
        "5 seeds with this spread show a difference from 0.27 points on, four times in five"
    )
    assert "show a difference" in compare_two(DEPTHWISE, PLAIN, power=0.9).reason
    assert compare_two(DEPTHWISE, PLAIN, power=0.9).reason.endswith("in 90 % of tries")
    assert "(90 % interval" in compare_two(DEPTHWISE, PLAIN, alpha=0.1).reason


def test_reason_says_when_holm_made_the_difference():
    arms = {"plain": PLAIN, "light": LIGHT, **{f"arm{index}": DEPTHWISE for index in range(4)}}
    results = compare_arms(arms, baseline="plain")
    light = results["light"]
    assert light.low is not None
    assert light.low > 0
    assert light.p_holm is not None
    assert light.p_holm >= 0.05
    assert light.verdict == "not resolved"
    assert light.reason == (
        "not resolved: the difference of +0.45 points (95 % interval 0.15 to 0.75, 5 seeds) would count if it were the "
        "only comparison, but 5 arms were compared with the baseline, and with Holm's correction for that (p = 0.07) "
        "it may be chance"
    )
    assert results["arm0"].reason.endswith("if only one arm is compared")


def test_one_seed():
    result = compare_two([0.96], [0.95])
    assert result.mean == pytest.approx(0.01)
    assert result.verdict == "not resolved"
    assert "one seed cannot tell" in result.reason
    for name in ("sd", "low", "high", "p_value", "p_holm", "detectable"):
        assert getattr(result, name) is None


@pytest.mark.parametrize("noise", [0.0, 1e-17, 1e-16, 3e-8])
def test_no_spread(noise):
    # 3e-8 is half a float32 step near 1: metrics come out of torch in float32.
    baseline = np.asarray([0.90, 0.92, 0.94, 0.91])
    result = compare_two(baseline + 0.02 + noise * np.asarray([1, -1, 1, 0]), baseline)
    assert result.verdict == "not resolved"
    assert result.mean == pytest.approx(0.02)
    assert "every one of the 4 seeds gave the same difference of +2.00 points" in result.reason
    for name in ("sd", "low", "high", "p_value", "p_holm", "detectable"):
        assert getattr(result, name) is None


def test_spread_of_a_single_image_counts():
    # One image in a million, well above rounding.
    result = compare_two([0.92, 0.92, 0.920001], [0.9, 0.9, 0.9])
    assert result.verdict == "better"


def test_an_arm_that_cannot_be_tested_still_counts_for_holm():
    results = compare_arms({"plain": PLAIN, "same": PLAIN, "light": LIGHT}, baseline="plain")
    assert results["same"].p_holm is None
    assert results["same"].mean == 0
    assert results["light"].p_value is not None
    assert results["light"].p_holm == pytest.approx(2 * results["light"].p_value)


def test_baseline_alone():
    assert compare_arms({"plain": PLAIN}, baseline="plain") == {}


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({"plain": PLAIN, "light": LIGHT[:4]}, {}, "equally many scores: got 4 for 'light' and 5 for 'plain'"),
        ({"plain": [0.5, math.nan], "light": [0.5, 0.6]}, {}, "fractions from 0 to 1: got nan for 'plain'"),
        ({"plain": [0.5, 0.5], "light": [0.5, math.inf]}, {}, "fractions from 0 to 1: got inf for 'light'"),
        ({"plain": [95.0, 94.0], "light": [95.5, 96.0]}, {}, "divide percentages by 100"),
        ({"light": LIGHT}, {}, "baseline must be one of the arms: got 'plain'; choose from light"),
        ({}, {}, "choose from none"),
        ({"plain": [], "light": []}, {}, "one score per seed"),
        ({"plain": PLAIN, "light": LIGHT}, {"alpha": 0.0}, "0 < alpha < power < 1"),
        ({"plain": PLAIN, "light": LIGHT}, {"power": 1.0}, "0 < alpha < power < 1"),
        ({"plain": PLAIN, "light": LIGHT}, {"power": 0.01}, "0 < alpha < power < 1"),
    ],
)
def test_bad_input(scores, options, message):
    with pytest.raises(ValueError, match=message) as error:
        compare_arms(scores, baseline="plain", **options)
    assert "\n" not in str(error.value)


def test_summary():
    assert summary([0.5]) == (0.5, None)
    mean, sd = summary([2, 4, 4, 4, 5, 5, 7, 9])
    assert mean == 5
    assert sd == pytest.approx(math.sqrt(32 / 7))
    with pytest.raises(ValueError, match="at least one value"):
        summary([])
