"""Paired comparisons of arms over seeds: intervals, Holm's correction, and plain words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

# One number per seed; checkers at run time do not take an int for a float.
Values = Sequence[float | int] | np.ndarray
Verdict = Literal["better", "worse", "not resolved"]


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """How one arm differs from the baseline, over seeds that both were trained with.

    All numbers are fractions (0.01 is one percentage point); only ``reason`` speaks in points. What one seed, or seeds
    without any spread, cannot tell is None.

    Args:
        baseline: Name of the arm compared with.
        arm: Name of the arm.
        seeds: Number of paired seeds, ``k``.
        mean: Mean over seeds of arm minus baseline.
        sd: Standard deviation of those differences (``k - 1`` in the denominator).
        low: Lower end of the paired-t interval with ``k - 1`` degrees of freedom, 95 % unless asked otherwise.
        high: Upper end of it.
        p_value: Two-sided p-value of the paired t test, for this comparison alone.
        p_holm: The p-value after Holm's correction over all arms compared with the baseline; it decides the verdict.
        detectable: Smallest true difference that a single comparison with this many seeds and this spread would have
            shown with 80 % power (unless asked otherwise), before Holm's correction.
        verdict: ``"better"``, ``"worse"`` or ``"not resolved"``.
        reason: The verdict as one plain sentence: the difference, its interval, and what could have been shown.
    """

    baseline: str
    arm: str
    seeds: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    p_value: float | None
    p_holm: float | None
    detectable: float | None
    verdict: Verdict
    reason: str


def compare_arms(
    scores: Mapping[str, Values],
    *,
    baseline: str,
    higher_is_better: bool = True,
    alpha: float = 0.05,
    power: float = 0.8,
) -> dict[str, PairedDifference]:
    r"""Compare every arm with the baseline, seed by seed.

    With :math:`D_i` the difference at seed i, :math:`\bar D` their mean and :math:`s` their standard deviation,

    .. math:: t = \bar D \sqrt k / s, \qquad \bar D \pm t_{1-\alpha/2,\,k-1}\, s / \sqrt k,

    and ``detectable`` is the :math:`\delta` for which noncentral t with noncentrality :math:`\delta \sqrt k / s` falls
    outside :math:`\pm t_{1-\alpha/2,\,k-1}` with probability ``power``. The interval covers the choice of the seed, on
    one fixed test set.

    Args:
        scores: Per arm one fraction (0 to 1) per seed; the same position is the same seed in every arm.
        baseline: The arm that all others are compared with.
        higher_is_better: True for accuracies, False for error rates.
        alpha: Two-sided error rate of the tests; the intervals cover ``1 - alpha``.
        power: Probability with which ``detectable`` would have been shown.

    Returns:
        One `PairedDifference` per arm but the baseline, in the order of ``scores``.

    Raises:
        ValueError: If the baseline is unknown, the arms differ in length, an arm has no score, a score is not a finite
            fraction, or alpha and power are not 0 < alpha < power < 1.

    Example:
        >>> result = compare_arms({"plain": [0.90, 0.91, 0.92], "light": [0.94, 0.96, 0.96]}, baseline="plain")
        >>> result["light"].verdict
        'better'
        >>> for part in result["light"].reason.replace(", 3 seeds show", "; 3 seeds show").split("; "):
        ...     print(part)
        light is better than plain by 4.33 points (95 % interval 2.90 to 5.77, 3 seeds)
        with the spread of these paired differences
        3 seeds show a true difference of 1.88 points or more with 80 % power
    """
    if not 0 < alpha < power < 1:
        raise ValueError(f"alpha and power must keep 0 < alpha < power < 1: got alpha={alpha}, power={power}")
    table = _checked(scores, baseline)
    differences = {arm: values - table[baseline] for arm, values in table.items() if arm != baseline}
    tests = {
        arm: _paired_t(values, _rounding(table[arm], table[baseline]), alpha) for arm, values in differences.items()
    }
    # An arm that could not be tested still counts as a comparison that was made: it takes the p-value 1.
    adjusted = holm([1.0 if test is None else test[0] for test in tests.values()])
    results = {}
    for (arm, values), p_holm in zip(differences.items(), adjusted, strict=True):
        test = tests[arm]
        seeds, mean, sd = len(values), *summary(values)
        if test is None:
            low = high = p_value = sd = detectable = None
            verdict, reason = "not resolved", _reason_without_spread(arm, baseline, mean, seeds)
        else:
            assert sd is not None
            p_value, low, high = test
            detectable = sd / math.sqrt(seeds) * _noncentrality(seeds, alpha, power)
            verdict = "not resolved" if p_holm >= alpha else "better" if (mean > 0) == higher_is_better else "worse"
            interval = f"{100 * (1 - alpha):g} % interval"
            if verdict != "not resolved":
                reason = _reason_resolved(arm, baseline, verdict, mean, low, high, interval, seeds)
            elif p_value < alpha:
                reason = _reason_holm(mean, low, high, interval, seeds, comparisons=len(differences), p_holm=p_holm)
            else:
                reason = f"not resolved: {_seen(mean, low, high, interval, seeds)} may be chance"
            reason += f"; {_reason_detectable(detectable, seeds, power, comparisons=len(differences))}"
        results[arm] = PairedDifference(
            baseline=baseline,
            arm=arm,
            seeds=seeds,
            mean=mean,
            sd=sd,
            low=low,
            high=high,
            p_value=p_value,
            p_holm=None if test is None else p_holm,
            detectable=detectable,
            verdict=verdict,
            reason=reason,
        )
    return results


def holm(p_values: Sequence[float | int]) -> list[float]:
    r"""Adjust p-values for their number by Holm's step-down method.

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1)\, p_{(j)})

    Args:
        p_values: The p-values of all comparisons made, in any order.

    Returns:
        The adjusted p-values, in the given order.

    Raises:
        ValueError: If a p-value is not between 0 and 1.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03, 0.005])]
        [0.03, 0.06, 0.06, 0.02]
    """
    for p_value in p_values:
        if not 0 <= p_value <= 1:
            raise ValueError(f"p-values must lie between 0 and 1: got {p_value}; leave out what was not tested")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * float(p_values[index])))
        adjusted[index] = largest
    return adjusted


def summary(values: Values) -> tuple[float, float | None]:
    """Mean and standard deviation (``k - 1`` in the denominator) of values over seeds.

    Args:
        values: One value per seed.

    Returns:
        The mean, and the standard deviation, which is None for a single value.

    Raises:
        ValueError: If there is no value.

    Example:
        >>> summary([1.0, 2.0, 3.0])
        (2.0, 1.0)
        >>> summary([1.0])
        (1.0, None)
    """
    if not len(values):
        raise ValueError("a summary needs at least one value: got none; give one value per seed")
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None


def _checked(scores: Mapping[str, Values], baseline: str) -> dict[str, np.ndarray]:
    if baseline not in scores:
        raise ValueError(
            f"baseline must be one of the arms: got {baseline!r}; choose from {', '.join(scores) or 'none'}"
        )
    table = {arm: np.asarray(values, dtype=np.float64) for arm, values in scores.items()}
    for arm, values in table.items():
        if values.ndim != 1 or not len(values):
            raise ValueError(f"an arm needs one score per seed: got shape {values.shape} for {arm!r}; give a flat list")
        if len(values) != len(table[baseline]):
            raise ValueError(
                f"arms are paired by seed and must have equally many scores: got {len(values)} for {arm!r} and "
                f"{len(table[baseline])} for {baseline!r}; finish the missing runs or leave their seeds out of both"
            )
        for value in values:
            if not 0 <= value <= 1:
                raise ValueError(
                    f"scores must be fractions from 0 to 1: got {value} for {arm!r}; divide percentages by 100 and "
                    "leave failed seeds out of every arm"
                )
    return table


def _rounding(arm: np.ndarray, baseline: np.ndarray) -> float:
    # Scores often come out of float32 metrics: what differs by less than their rounding does not differ.
    return 4 * float(np.finfo(np.float32).eps) * max(float(arm.max()), float(baseline.max()))


def _paired_t(differences: np.ndarray, rounding: float, alpha: float) -> tuple[float, float, float] | None:
    """P-value and interval of the mean difference; None where the differences show no spread."""
    if len(differences) < 2 or np.ptp(differences) <= rounding:
        return None
    from scipy import stats

    mean, error, degrees = (
        differences.mean(),
        differences.std(ddof=1) / math.sqrt(len(differences)),
        len(differences) - 1,
    )
    half = stats.t.isf(alpha / 2, degrees) * error
    return float(2 * stats.t.sf(abs(mean) / error, degrees)), float(mean - half), float(mean + half)


@lru_cache
def _noncentrality(seeds: int, alpha: float, power: float) -> float:
    """Noncentrality at which the two-sided t test with ``seeds - 1`` degrees of freedom has this power."""
    from scipy import optimize, stats

    degrees = seeds - 1
    critical = float(stats.t.isf(alpha / 2, degrees))

    def missing(noncentrality: float) -> float:
        # By symmetry the lower tail is an upper tail; scipy's nct.cdf gives NaN there where the tail is negligible.
        tails = stats.nct.sf(critical, degrees, noncentrality) + stats.nct.sf(critical, degrees, -noncentrality)
        return float(tails) - power

    upper = 1.0
    while missing(upper) < 0:
        upper *= 2
    # Near zero the power is alpha, which is below the power asked for.
    return float(optimize.root_scalar(missing, bracket=(1e-6, upper), method="brentq", xtol=1e-10).root)


def _points(value: float, sign: str = "") -> str:
    # Adding zero turns a rounded -0.0 into 0.0.
    return f"{round(100 * value, 2) + 0.0:{sign}.2f}"


def _count(seeds: int) -> str:
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


def _seen(mean: float, low: float, high: float, interval: str, seeds: int) -> str:
    span = f"{interval} {_points(low)} to {_points(high)}, {_count(seeds)}"
    return f"the difference of {_points(mean, '+')} points ({span})"


def _reason_resolved(
    arm: str, baseline: str, verdict: Verdict, mean: float, low: float, high: float, interval: str, seeds: int
) -> str:
    near, far = sorted((abs(low), abs(high)))
    span = f"{interval} {_points(near)} to {_points(far)}, {_count(seeds)}"
    return f"{arm} is {verdict} than {baseline} by {_points(abs(mean))} points ({span})"


def _reason_holm(
    mean: float, low: float, high: float, interval: str, seeds: int, *, comparisons: int, p_holm: float
) -> str:
    return (
        f"not resolved: {_seen(mean, low, high, interval, seeds)} would count if it were the only comparison, but "
        f"{comparisons} arms were compared with the baseline, and with Holm's correction for that (p = {p_holm:.2g}) "
        "it may be chance"
    )


def _reason_detectable(detectable: float, seeds: int, power: float, *, comparisons: int) -> str:
    alone = "" if comparisons == 1 else ", were one arm compared alone"
    least = f"{_points(detectable)} points or more with {100 * power:g} % power{alone}"
    return f"with the spread of these paired differences, {_count(seeds)} show a true difference of {least}"


def _reason_without_spread(arm: str, baseline: str, mean: float, seeds: int) -> str:
    if seeds == 1:
        return (
            f"not resolved: {arm} and {baseline} differ by {_points(mean, '+')} points with 1 seed, and one seed "
            "cannot tell a difference from chance; use at least 3"
        )
    return (
        f"not resolved: every one of the {seeds} seeds gave the same difference of {_points(mean, '+')} points, so the "
        "spread cannot be estimated; use more seeds or a larger test set"
    )
