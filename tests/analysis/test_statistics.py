import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from mrla.analysis.proportions import images_needed, paired_interval, proportion_interval
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


SHOWN = (
    "with the spread of these paired differences, 5 seeds show a true difference of {} points or more with 80 % power"
)


def test_reasons_read_well():
    resolved = compare_two(LIGHT, PLAIN)
    assert resolved.reason == (
        f"light is better than plain by 0.45 points (95 % interval 0.15 to 0.75, 5 seeds); {SHOWN.format('0.41')}"
    )
    assert compare_two(PLAIN, LIGHT).reason == resolved.reason.replace(
        "light is better than plain", "light is worse than plain"
    )
    assert compare_two(DEPTHWISE, PLAIN).reason == (
        "not resolved: the difference of +0.04 points (95 % interval -0.16 to 0.23, 5 seeds) may be chance; "
        + SHOWN.format("0.27")
    )
    assert compare_two(DEPTHWISE, PLAIN, power=0.9).reason.endswith("points or more with 90 % power")
    assert "(90 % interval" in compare_two(DEPTHWISE, PLAIN, alpha=0.1).reason


@pytest.mark.parametrize("arm", [LIGHT, DEPTHWISE])
def test_a_reason_gives_the_detectable_difference_of_its_number(arm):
    result = compare_two(arm, PLAIN)
    assert result.detectable is not None
    assert f"a true difference of {100 * result.detectable:.2f} points or more with 80 % power" in result.reason


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
        f"it may be chance; {SHOWN.format('0.41')}, were one arm compared alone"
    )


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


def score_by_likelihood(gained: float, lost: float, images: int, delta: float) -> float:
    """Tango's score with the nuisance share found by maximising the likelihood, not by its closed form."""

    def negative_likelihood(share: float) -> float:
        shares = (share + delta, share, 1 - 2 * share - delta)
        counts = (gained, lost, images - gained - lost)
        return -sum(count * math.log(max(p, 1e-300)) for count, p in zip(counts, shares, strict=True) if count)

    low, high = max(0.0, -delta), (1 - delta) / 2
    share = optimize.minimize_scalar(
        negative_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-13}
    ).x
    return (gained - lost - images * delta) / math.sqrt(images * (2 * share + delta * (1 - delta)))


def test_paired_interval_published_examples():
    # Airway hyper-responsiveness: Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014), 2850-2875.
    assert paired_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    # R's PropCIs 0.3-0: scoreci.mp(25, 28, 618, conf.level = 0.90).
    assert paired_interval(28, 25, 618, alpha=0.1) == pytest.approx((-0.0148, 0.0247), abs=5e-5)


@pytest.mark.parametrize(
    ("gained", "lost", "images"), [(3, 9, 50), (12, 2, 50), (40, 20, 160), (5, 1, 400), (0, 4, 30)]
)
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 16])
def test_paired_interval_ends_where_the_score_test_does(gained, lost, images, alpha):
    low, high = paired_interval(gained, lost, images, alpha=alpha)
    critical = stats.norm.isf(alpha / 2)
    assert score_by_likelihood(gained, lost, images, low) == pytest.approx(critical, rel=1e-4)
    assert score_by_likelihood(gained, lost, images, high) == pytest.approx(-critical, rel=1e-4)


def test_paired_interval_leaves_out_zero_where_mcnemar_does():
    for gained in range(0, 30, 3):
        for lost in range(0, 30, 4):
            low, high = paired_interval(gained, lost, 100)
            chi_squared = (gained - lost) ** 2 / (gained + lost) if gained + lost else 0.0
            assert (not low <= 0 <= high) == (chi_squared > stats.chi2.isf(0.05, 1))


def test_paired_interval_rules():
    squared = stats.norm.isf(0.025) ** 2
    for images in (1, 48, 1000):
        assert paired_interval(0, 0, images) == pytest.approx(
            (-squared / (images + squared), squared / (images + squared))
        )
        assert paired_interval(images, 0, images)[1] == 1
        assert paired_interval(0, images, images)[0] == -1
    low, high = paired_interval(7, 3, 80)
    assert paired_interval(3, 7, 80) == pytest.approx((-high, -low))
    assert low < 4 / 80 < high
    wide = paired_interval(7, 3, 80, alpha=0.001)
    assert wide[0] < low
    assert wide[1] > high
    for bad in ((1, 1, 1), (-1, 0, 5), (0, 0, 0), (math.nan, 0, 5)):
        with pytest.raises(ValueError, match="changed images are counted among all: got"):
            paired_interval(*bad)
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1: got 1"):
        paired_interval(1, 0, 5, alpha=1)


@pytest.mark.parametrize(
    ("gain", "loss", "images"), [(0.02, 0.02, 200), (0.01, 0.03, 500), (0.1, 0.05, 60), (0.0, 0.01, 400)]
)
def test_paired_interval_covers(gain, loss, images):
    draws = 2000
    counts = np.random.default_rng(4).multinomial(images, (gain, loss, 1 - gain - loss), size=draws)
    kinds, times = np.unique(counts[:, :2], axis=0, return_counts=True)
    intervals = np.array([paired_interval(int(gained), int(lost), images) for gained, lost in kinds])
    covers = (intervals[:, 0] <= gain - loss) & (gain - loss <= intervals[:, 1])
    covered = float((covers * times).sum()) / draws
    # A score interval keeps its level about, not exactly: counts are whole numbers, of the last case 4 in the mean.
    assert 0.91 < covered < 0.985
    # What is wrongly shown to lose less than it does: at most about one in forty.
    assert float(((intervals[:, 0] > gain - loss) * times).sum()) / draws < 0.04


def test_a_bootstrap_of_no_changed_image_shows_anything_and_the_score_interval_does_not():
    changes = np.zeros(48)
    resampled = np.random.default_rng(0).choice(changes, (1000, 48)).mean(1)
    assert np.ptp(resampled) == 0
    assert paired_interval(0, 0, 48)[0] < -0.07


@pytest.mark.parametrize(
    ("gained", "lost", "images"), [(0, 0, 48), (0, 1, 400), (3, 0, 48), (5, 6, 449), (10, 10, 1000)]
)
def test_images_needed_is_the_smallest_number_that_shows_it(gained, lost, images):
    needed = images_needed(gained, lost, images, margin=0.01)
    assert needed is not None

    def lowest(count: int) -> float:
        return paired_interval(gained * count / images, lost * count / images, count)[0]

    assert lowest(needed) >= -0.01
    assert needed == 1 or lowest(needed - 1) < -0.01
    assert (lowest(images) >= -0.01) == (needed <= images)


def test_images_needed_of_none_changed_and_of_too_many_lost():
    squared = stats.norm.isf(0.025) ** 2
    assert images_needed(0, 0, 48, margin=0.005) == math.ceil(squared * (1 - 0.005) / 0.005) == 765
    assert images_needed(0, 5, 500, margin=0.01) is None
    assert images_needed(0, 0, 48, margin=0.0) is None
    assert images_needed(5, 0, 48, margin=0.0) is not None


def test_proportion_interval():
    # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3.
    for hits, images, ends in ((81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611))):
        assert proportion_interval(hits, images) == pytest.approx(ends, abs=5e-5)
        low, high = stats.binomtest(hits, images).proportion_ci(0.95, method="wilson")
        assert proportion_interval(hits, images) == pytest.approx((low, high))
    assert proportion_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    for bad in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="hits are counted among images: got"):
            proportion_interval(*bad)
