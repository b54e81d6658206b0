import random

import numpy as np
import pytest
import torch

from mrla.train.randomness import derive_seed, seeded


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(np.random.rand())


def test_a_seed_never_changes():
    # Finished runs could not be repeated otherwise; Python's hash() would give another number in each process.
    assert derive_seed(0, "sample", 3, 7) == 8047345764584900824


def test_seeds_for_different_purposes_differ_and_fit_in_63_bits():
    purposes = [(seed, *parts) for seed in (0, 1, 11) for parts in [(), ("a",), ("b",), *((1, n) for n in range(300))]]
    seeds = {derive_seed(*purpose) for purpose in purposes}
    assert len(seeds) == len(purposes)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


def test_seeded_draws_are_a_function_of_the_seed():
    def inside(seed):
        with seeded(seed):
            return draw()

    first, other = inside(derive_seed(0, 1)), inside(derive_seed(0, 2))
    draw()
    assert inside(derive_seed(0, 1)) == first
    assert not set(first) & set(other)


@pytest.mark.parametrize("fails", [False, True])
def test_seeded_gives_all_three_generators_back(fails):
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    draw()
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    expected = draw()
    torch.set_rng_state(torch_state)
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    try:
        with seeded(5):
            draw()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert draw() == expected
