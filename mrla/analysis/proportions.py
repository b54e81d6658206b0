"""Intervals of a share of images, and of the difference of two shares of the same images."""

import math
from collections.abc import Callable
from statistics import NormalDist


def paired_interval(
    gained: float | int, lost: float | int, images: float | int, *, alpha: float = 0.05
) -> tuple[float, float]:
    r"""Tango's score interval of the difference of two proportions over the same images.

    Of :math:`n` images :math:`b` are right with the second network alone and :math:`c` with the first alone. The
    interval holds every difference :math:`\delta` that the score test does not reject,

    .. math::

        \left| \frac{b - c - n \delta}{\sqrt{n \, (2 \hat q + \delta (1 - \delta))}} \right| \le z_{1 - \alpha / 2},
        \qquad 2 n \hat q^2 + \left( (2 n - b + c) \, \delta - b - c \right) \hat q - c \, \delta (1 - \delta) = 0,

    where :math:`\hat q`, the larger root, is the most likely share of lost images if :math:`\delta` is the difference.
    It holds where few images change: of none it is :math:`\pm z^2 / (n + z^2)`, where a t test or a bootstrap says 0.

    Source: T. Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 17 (1998), 891-908.

    Args:
        gained: Images that are right with the second network alone, ``b``.
        lost: Images that are right with the first alone, ``c``.
        images: All of them, ``n``. Numbers need not be whole, so that shares can be carried over to other ``n``.
        alpha: The interval covers ``1 - alpha``.

    Returns:
        Its ends, fractions from -1 to 1.

    Raises:
        ValueError: If there is no image, fewer images than changed ones, or alpha is not between 0 and 1.

    Example:
        Airway hyper-responsiveness before and after stem cell transplantation, 21 children (Fagerland et al. 2014):

        >>> [round(end, 3) for end in paired_interval(1, 7, 21)]
        [-0.517, -0.026]
        >>> [round(end, 3) for end in paired_interval(0, 0, 48)]
        [-0.074, 0.074]
    """
    if not (images > 0 and gained >= 0 and lost >= 0 and gained + lost <= images):
        raise ValueError(
            f"changed images are counted among all: got {gained} gained and {lost} lost of {images}; give counts from "
            "0 whose sum is not above a positive number of images"
        )
    critical = _critical(alpha) ** 2
    difference, changed = gained - lost, gained + lost

    def rejected(delta: float) -> float:
        """Above zero where the score test rejects this difference; free of divisions, so that both ends are fine."""
        linear = (2 * images - difference) * delta - changed
        root = math.sqrt(max(0.0, linear**2 + 8 * images * lost * delta * (1 - delta)))
        share = (root - linear) / (4 * images)
        return (difference - images * delta) ** 2 - critical * images * (2 * share + delta * (1 - delta))

    seen = difference / images
    return _root_between(rejected, seen, -1.0), _root_between(rejected, seen, 1.0)


def images_needed(
    gained: float | int, lost: float | int, images: int, *, margin: float, alpha: float = 0.05
) -> int | None:
    """How many images would show that the second network loses no more than a margin, if the shares stay as seen.

    That is the smallest number of images at which the lower end of `paired_interval` is not below ``-margin``. The next
    images may change more or less: as often as not somewhat more are needed.

    Args:
        gained: Images that are right with the second network alone, of those seen.
        lost: Images that are right with the first alone.
        images: All images seen.
        margin: What may be lost, a fraction.
        alpha: The interval covers ``1 - alpha``.

    Returns:
        The number; None where no number would show it: the loss seen is the margin already, or more.

    Raises:
        ValueError: As `paired_interval`.

    Example:
        >>> images_needed(0, 0, 48, margin=0.005)
        765
        >>> images_needed(0, 1, 48, margin=0.005) is None
        True
    """
    lost_share, gained_share = lost / images, gained / images

    def shown(count: int) -> bool:
        return paired_interval(gained_share * count, lost_share * count, count, alpha=alpha)[0] >= -margin

    if lost_share - gained_share >= margin:
        return None
    enough = 1
    while not shown(enough):
        enough *= 2
    short = enough // 2
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (short, middle) if shown(middle) else (middle, enough)
    return enough


def proportion_interval(hits: int, images: int, *, alpha: float = 0.05) -> tuple[float, float]:
    r"""Wilson's score interval of a proportion, such as an accuracy.

    .. math:: \frac{\hat p + z^2 / 2n \pm z \sqrt{\hat p (1 - \hat p) / n + z^2 / 4n^2}}{1 + z^2 / n}

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, Journal of the American
    Statistical Association 22 (1927), 209-212.

    Args:
        hits: How many of the images are right.
        images: All of them.
        alpha: The interval covers ``1 - alpha``.

    Returns:
        Its ends, fractions from 0 to 1.

    Raises:
        ValueError: If there is no image, fewer images than hits, or alpha is not between 0 and 1.

    Example:
        >>> [round(end, 4) for end in proportion_interval(81, 263)]
        [0.2553, 0.3662]
    """
    if not 0 <= hits <= images or not images:
        raise ValueError(f"hits are counted among images: got {hits} of {images}; give a positive number of images")
    squared = _critical(alpha) ** 2
    share = hits / images
    middle = share + squared / (2 * images)
    half = math.sqrt(squared * (share * (1 - share) + squared / (4 * images)) / images)
    whole = 1 + squared / images
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def _critical(alpha: float) -> float:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1: got {alpha}; 0.05 gives intervals of 95 %")
    return NormalDist().inv_cdf(1 - alpha / 2)


def _root_between(function: Callable[[float], float], inside: float, outside: float) -> float:
    """Where a function that is not above zero at `inside` passes zero on the way to `outside`; else `outside`."""
    if function(outside) <= 0:
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        if function(middle) <= 0:
            inside = middle
        else:
            outside = middle
    return inside
