"""Whoever calls the blocks of a network with mixers gets the right numbers or one clear error: `callers.py`."""

import itertools

import pytest
from callers import BEGIN, CALLERS, END, METHODS, NETWORKS, README, make, table

PAIRS = list(itertools.product(NETWORKS, METHODS))
# Each network with one method and each method with one network; the other pairs are in the sweep.
FEW = list(zip(NETWORKS, ("base", "light", "exact", "dw"), strict=True))


def cases() -> list:
    found = []
    for name, caller in CALLERS.items():
        for network, method in PAIRS:
            few = (network, method) in (FEW[:1] if caller.slow else FEW)
            marks = [] if few else [pytest.mark.sweep]
            found.append(pytest.param(name, network, method, marks=marks, id=f"{name}-{network}-{method}"))
    return found


@pytest.mark.unchecked
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "network", "method"), cases())
def test_callers(name, network, method):
    CALLERS[name].prove(make(network, method))


def test_the_table_in_the_readme_is_theirs():
    text = README.read_text()
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == table(), "run python tests/models/callers.py --write"
