"""The promises of attach and detach, over a small network of each of timm's families and torchvision's builders.

What is asked, and of which networks, is in benchmarks/attach_coverage.py.
"""

import attach_coverage as coverage
import pytest
import torch
from conftest import sweep_but

import mrla

# No residual blocks of one shape in a row, or a tree of them; blocks that are attributes of the network (NASNet,
# PNASNet, Xception, GoogLeNet); blocks that work on pixels inside patches (TNT) or on patches in groups (NesT, Hiera).
WITHOUT_CHAINS = {
    *(f"timm/{family}" for family in ("densenet", "dla", "hiera", "inception_v3", "nasnet", "nest")),
    *(f"timm/{family}" for family in ("pnasnet", "selecsls", "tnt", "vgg", "xception")),
    *(f"torchvision/{name}" for name in ("alexnet", "densenet121", "googlenet", "inception_v3", "vgg11")),
    "torchvision/shufflenet_v2_x0_5",
}
# A promise that a network cannot keep, and why.
NOT_KEPT: dict[tuple[str, str, str], str] = {}
KEPT = dict.fromkeys(coverage.PROMISES, "kept")
NETWORKS = coverage.networks()
# Convolutions, tokens with and without a class token, channels last, two sizes of token maps, a network of torchvision.
USUAL = {
    *(f"timm/{family}" for family in ("convnext", "efficientnet", "mlp_mixer", "pvt_v2", "resnet", "swin_transformer")),
    *("timm/vision_transformer", "torchvision/mobilenet_v3_small"),
}


@pytest.mark.unchecked  # a hundred networks, twice as slow with every annotation checked
@pytest.mark.parametrize("name", sweep_but(USUAL, [name for name in NETWORKS if name not in WITHOUT_CHAINS]))
def test_invariants_are_kept(name):
    row = coverage.look_at(name, NETWORKS[name])
    assert row["chains"] > 0, row["reason"]
    for method in coverage.METHODS:
        known = {p: what for (network, m, p), what in NOT_KEPT.items() if (network, m) == (name, method)}
        assert row[method] == {**KEPT, **known}, method


@pytest.mark.parametrize("name", sweep_but(("timm/tnt", "timm/vgg", "timm/xception"), sorted(WITHOUT_CHAINS)))
def test_a_network_without_chains_is_refused_and_stays_as_it_was(name):
    with torch.device("meta"):
        network = NETWORKS[name]()
    anatomy = coverage.anatomy(network)
    with pytest.raises(ValueError, match=r"no chain of blocks was found in this .*name those that hold blocks"):
        mrla.attach(network)
    assert coverage.anatomy(network) == anatomy
