"""What the list of networks says of them is what is counted on them."""

import json

import pytest
from conftest import sweep_but

from mrla.analysis.catalogue import COUNTS, count_network, list_networks
from mrla.models import NAMED

LISTED = sorted(name for name in NAMED if not name.startswith("test_"))
QUICK = ("resnet18_cifar", "resnet18_mrla_light", "pvt_v2_b0_mrla_base", "deit_tiny_patch16_224_mrla_light")


@pytest.mark.parametrize("name", sweep_but(QUICK, LISTED))
def test_the_counts_are_those_of_the_network(name):
    found = {key: value for key, value in list_networks(name)[0].items() if key in ("parameters", "macs")}
    assert found == count_network(name), "call mrla.analysis.catalogue.write_counts()"


def test_every_network_is_listed():
    assert sorted(json.loads(COUNTS.read_text())) == LISTED
    assert sorted(network["name"] for network in list_networks()) == LISTED
