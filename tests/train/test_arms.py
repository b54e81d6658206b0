import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import randomise_norms

from mrla.data.samples import ImageFacts
from mrla.models import is_attached
from mrla.ops import METHODS
from mrla.train import Digits, MixerOptions, get_recipe
from mrla.train.arms import build_arm, count_parameters

FACTS = Digits().facts()
TINY = replace(get_recipe("digits_resnet18"), model_args={"channels": [8, 8, 16, 16]})


def facts(classes: int, *, size: int = 32) -> ImageFacts:
    names = tuple(str(number) for number in range(classes))
    return replace(FACTS, in_chans=3, size=size, class_names=names, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize("init", ["released", "notebook"])
@pytest.mark.parametrize("arm", ["light", "base", "exact", "dw", "eca", "se"])
def test_arms_of_one_seed_share_the_plain_weights_bit_for_bit(arm, init):
    recipe = replace(TINY, init=init, seed=5)
    plain = build_arm(replace(recipe, arm="plain"), FACTS).state_dict()
    other = build_arm(replace(recipe, arm=arm), FACTS).state_dict()
    again = build_arm(replace(recipe, arm=arm), FACTS).state_dict()
    assert set(other) > set(plain)  # what the arm adds, and nothing renamed
    assert all(torch.equal(other[name], plain[name]) for name in plain)
    assert all(torch.equal(other[name], again[name]) for name in other)
    new = [name for name in other if name not in plain]
    assert all((".mrla" in name) == (arm in METHODS) for name in new)


@pytest.mark.parametrize("arm", ["plain", "light", "base", "exact", "dw", "eca", "se"])
def test_another_seed_gives_another_network(arm):
    recipe = replace(TINY, arm=arm)
    one, other = (dict(build_arm(replace(recipe, seed=seed), FACTS).named_parameters()) for seed in (0, 1))
    drawn = [name for name, weight in one.items() if weight.ndim > 1 or name.endswith("decay")]
    assert len(drawn) > 20
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


@pytest.mark.parametrize("arm", ["plain", "light", "base", "exact", "dw", "eca", "se"])
def test_the_global_random_state_neither_matters_nor_moves(arm):
    recipe = replace(TINY, arm=arm)
    one = build_arm(recipe, FACTS).state_dict()
    torch.manual_seed(77)
    random.seed(77)
    np.random.seed(77)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    other = build_arm(recipe, FACTS).state_dict()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("arm", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_an_arm_with_the_identity_start_says_what_the_plain_one_says(arm, training):
    recipe = replace(TINY, init="identity")
    plain = randomise_norms(build_arm(replace(recipe, arm="plain"), FACTS))
    attached = build_arm(replace(recipe, arm=arm), FACTS)
    attached.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(attached.train(training)(images), plain.train(training)(images))


def test_the_released_start_does_change_the_logits():
    plain, light = (build_arm(replace(TINY, arm=arm), FACTS).eval() for arm in ("plain", "light"))
    images = torch.randn(4, 1, 8, 8)
    assert not torch.equal(plain(images), light(images))


def test_every_arm_takes_the_images_and_names_its_classes():
    for arm in ("plain", "light", "base", "exact", "dw", "eca", "se"):
        model = build_arm(replace(TINY, arm=arm), FACTS)
        assert model.training
        assert model(torch.randn(2, FACTS.in_chans, FACTS.size, FACTS.size)).shape == (2, 10)
        assert is_attached(model) == (arm in METHODS)


def test_the_mixers_are_built_as_the_recipe_says():
    mixer = MixerOptions(heads=2, carry="output", norm="layer", drop_path=0.25)
    block = build_arm(replace(TINY, mixer=mixer), FACTS).get_submodule("layer1.0.mrla")
    text = str(block)
    assert "LayerNorm" in text or "GroupNorm" in text
    assert "BatchNorm" not in text
    drops = [module.drop_prob for module in block.modules() if hasattr(module, "drop_prob")]
    assert drops == [0.25]


def test_the_counts_of_the_notebook():
    recipe = get_recipe("cifar10_resnet18")
    light, plain = (count_parameters(build_arm(replace(recipe, arm=arm), facts(10))) for arm in ("light", "plain"))
    assert light == {"trainable": 11_197_074, "with_statistics": 11_210_514}
    assert plain == {"trainable": 11_173_962, "with_statistics": 11_183_562}


def test_the_counts_of_the_released_code():
    recipe = get_recipe("imagenet_resnet50")
    plain, light = (build_arm(replace(recipe, arm=arm), facts(1000)) for arm in ("plain", "light"))
    assert [count_parameters(model)["trainable"] for model in (plain, light)] == [25_557_032, 25_738_452]


def test_frozen_parameters_are_not_counted():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    model[0].requires_grad_(False)
    assert count_parameters(model) == {"trainable": 8, "with_statistics": 16}  # num_batches_tracked is no statistic


def test_an_unknown_network_gets_the_nearest_name():
    with pytest.raises(ValueError, match=r"got 'resnet18_cifer'; did you mean 'resnet18_cifar'\?"):
        build_arm(replace(TINY, model="resnet18_cifer"), FACTS)


@pytest.mark.parametrize("arm", METHODS)
def test_mixers_are_not_attached_twice(arm):
    recipe = replace(TINY, model="resnet18_cifar_mrla_light", arm=arm)
    with pytest.raises(ValueError, match="'resnet18_cifar_mrla_light', which has mixers already"):
        build_arm(recipe, FACTS)
    assert is_attached(build_arm(replace(recipe, arm="plain"), FACTS))


@pytest.mark.parametrize("options", [{"head_dim": 5}, {"heads": 3}])
def test_heads_that_do_not_divide_the_channels(options):
    with pytest.raises(ValueError, match=r"divide.*got.*8"):
        build_arm(replace(TINY, mixer=MixerOptions(**options)), FACTS)


def test_an_argument_that_the_network_does_not_have():
    with pytest.raises(ValueError, match=r"resnet18_cifar cannot be built with .*'colours': 3"):
        build_arm(replace(TINY, model_args={"colours": 3}), FACTS)


def test_an_argument_that_the_network_refuses():
    with pytest.raises(ValueError, match=r"resnet18_cifar cannot be built with .*groupnorm.*divisible by num_groups"):
        build_arm(replace(TINY, model_args={"channels": [8, 8, 8, 8], "norm_layer": "groupnorm"}), FACTS)
