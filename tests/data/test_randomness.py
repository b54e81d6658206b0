import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from mrla.data.randomness import derive_seed, seed_generators, seeded
from mrla.train.arm_names import known_arms


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(np.random.rand())


def test_a_seed_never_changes():
    # Finished runs could not be repeated otherwise; Python's hash() would give another number in each process.
    assert derive_seed(0, "sample", 3, 7) == 8047345764584900824


def test_a_seed_is_the_same_in_every_process():
    code = "from mrla.data.randomness import derive_seed; print(derive_seed(3, 'order', 5, 'light'))"
    environment = {**os.environ, "PYTHONHASHSEED": "1234"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(said.stdout) == derive_seed(3, "order", 5, "light")


def test_no_two_purposes_of_a_run_share_a_seed():
    """Parts are joined by slashes, so a part that holds one could be taken for two: none of a run's does."""
    arms = [("weights", arm) for arm in known_arms()]
    numbers = range(1, 130)
    purposes = [("weights",), *arms, ("train",), ("val",)]
    purposes += [(name, number) for name in ("order", "loader") for number in numbers]
    purposes += [(name, one, two) for name in ("sample", "step") for one in numbers for two in numbers]
    assert not any("/" in str(part) for purpose in purposes for part in purpose)
    seeds = {derive_seed(seed, *purpose) for seed in (0, 1, 11) for purpose in purposes}
    assert len(seeds) == 3 * len(purposes)


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


def test_generators_are_seeded_as_torch_seeds_them():
    seed_generators(7, torch.device("cpu"))
    drawn = torch.rand(5)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(5), drawn)


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
