"""Recording what is heard, cutting it, and taking mixers out for good."""

import copy
import threading

import pytest
import timm
import torch
from conftest import randomise_norms, sweep_but
from torch import nn

import mrla
from mrla.models import MixedBlock, ablate, mixed_chains, recording, remove_mixers
from mrla.models.attachment import close_up
from mrla.models.mixed_blocks import MIXER
from mrla.ops import ChainPlace, LayerMixer, attention_over_layers, use

SMALL = {"channels": (8, 16, 24, 32), "num_classes": 7}
NETWORKS = {
    "resnet": lambda: timm.create_model("resnet34", **SMALL),
    "vit": lambda: timm.create_model("test_vit", num_classes=7),
    "convnext": lambda: timm.create_model("test_convnext", num_classes=7),
}
FORMS = [("light", {}), ("light", {"carry": "output"}), ("base", {}), ("exact", {})]


def randomized(name: str, method: str, **options) -> nn.Module:
    """A network whose mixers do much, and whose norms have seen images, so that no attention is all or nothing."""
    model = randomise_norms(mrla.attach(NETWORKS[name](), method, init="released", **options))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images(model, 8))
    return model.eval()


def images(model: nn.Module, count: int = 3) -> torch.Tensor:
    side = (model.pretrained_cfg or {}).get("input_size", (3, 64, 64))[-1] if hasattr(model, "patch_embed") else 64
    return torch.randn(count, 3, side, side)


def mixers(model: nn.Module) -> dict[str, LayerMixer]:
    return {path.removesuffix(f".{MIXER}"): one for path, one in model.named_modules() if isinstance(one, LayerMixer)}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(("method", "options"), FORMS)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_recorded_networks_say_the_same_and_keep_nothing(name, method, options):
    model = randomized(name, method, **options)
    x, before = images(model), hooks(model)
    expected, keys = model(x), list(model.state_dict())
    with recording(model) as heard:
        said = model(x)
        assert list(model.state_dict()) == keys
    assert hooks(model) == before
    assert torch.allclose(said, expected, atol=1e-4)
    assert torch.equal(model(x), expected)
    found = heard.attention_over_layers()
    assert [chain for chain, _ in found] == mixed_chains(model)
    for chain, weights in found:
        assert weights.shape[0] == 3
        assert weights.shape[2:] == (len(chain.blocks), len(chain.blocks) + 1)
        own = weights.diagonal(1, 2, 3)
        assert (own > 0).all()  # every block hears itself
        if method in ("base", "exact"):
            assert torch.allclose(weights.nansum(-1), torch.ones(()), atol=1e-5)
            assert weights[..., 0].isnan().all()


@torch.no_grad()
def test_what_is_recorded_is_what_the_mixers_hear():
    """By hand, through a whole network: every call of a mixer, one after the other."""
    model = randomized("resnet", "base")
    given: dict[str, list] = {chain.name: [] for chain in mixed_chains(model)}

    def keep(path):
        return lambda mixer, args, kwargs: given[path.split(".")[0]].append((mixer, args))

    handles = [one.register_forward_pre_hook(keep(path), with_kwargs=True) for path, one in mixers(model).items()]
    x = images(model)
    model(x)
    for handle in handles:
        handle.remove()
    with recording(model) as heard:
        model(x)
    for chain, weights in heard.attention_over_layers():
        expected = attention_over_layers([mixer.contributions(*args) for mixer, args in given[chain.name]])
        assert torch.allclose(weights, expected, equal_nan=True, atol=1e-5)


@torch.no_grad()
def test_a_network_built_to_hear_one_block_gives_exactly_that_map():
    """Keys of all blocks are orthogonal to every query but that of the second block of the third stage."""
    model = randomized("resnet", "base", heads=1)
    chain = mixed_chains(model)[2]
    assert len(chain.blocks) == 6
    for at, path in enumerate(chain.blocks):
        mixer = model.get_submodule(path).mrla
        for weight in (mixer.query_weight, mixer.key_weight):
            nn.init.zeros_(weight)
        mixer.query_weight[..., weight.shape[-1] // 2] = 1e4
        mixer.key_weight[..., weight.shape[-1] // 2] = 1e4 if at == 1 else -1e4
    # A block's output is a ReLU's: no mean is below zero, so q.k is far above zero for that key and far below for all
    # others, unless the block is dead.
    with recording(model) as heard:
        model(images(model))
    weights = heard.attention_over_layers()[2][1]
    assert torch.equal(weights[:, :, 0].nan_to_num()[..., 1], torch.ones(3, 1))  # the first has but itself
    wanted = torch.zeros(3, 1, 5, 7)
    wanted[..., 2] = 1
    assert torch.equal(weights[:, :, 1:].nan_to_num(), wanted)


@torch.no_grad()
def test_batches_are_put_one_behind_the_other_until_cleared():
    model = randomized("resnet", "light")
    x = images(model, 4)
    with recording(model, update_norms=True) as heard:
        model(x)
        whole, lengths = heard.attention_over_layers()[1][1], heard.update_norms()
        heard.clear()
        assert heard.attention_over_layers() == []
        model(x[:3])
        model(x[3:])
        parts, lengths_of_parts = heard.attention_over_layers()[1][1], heard.update_norms()
    assert torch.allclose(whole, parts, equal_nan=True, atol=1e-4)
    assert list(lengths) == list(mixers(model))
    for block, one in lengths.items():
        assert torch.allclose(one.attention, lengths_of_parts[block].attention, rtol=1e-3)
        assert torch.allclose(one.carried, lengths_of_parts[block].carried, rtol=1e-3)
    with recording(model) as heard:
        model(x)
    assert heard.update_norms() == {}


def test_what_was_heard_stays_as_it_was_and_in_no_graph():
    model = randomized("resnet", "light")
    with torch.inference_mode(), recording(model) as noted:
        model(images(model))
    with recording(model) as heard:
        model(images(model)).sum().backward()
    before = heard.attention_over_layers()[0][1]
    assert not before.requires_grad
    assert not noted.attention_over_layers()[0][1].requires_grad  # asked outside of inference mode
    with torch.no_grad():
        model.layer1[1].mrla.decay.zero_()
    assert torch.equal(heard.attention_over_layers()[0][1].nan_to_num(), before.nan_to_num())


@torch.no_grad()
def test_a_part_of_a_network_is_recorded_as_far_as_it_ran():
    model = randomized("resnet", "base")
    x = images(model)
    with recording(model) as heard:
        model.forward_intermediates(x, indices=[1], stop_early=True)
    assert [chain.name for chain, _ in heard.attention_over_layers()] == ["layer1"]
    with recording(model) as heard:
        steps = iter(model.layer1)
        next(steps)(model.maxpool(model.act1(model.bn1(model.conv1(x)))))
    with pytest.raises(ValueError, match=r"as often as the others to be recorded: got layer1.0 1, layer1.1 0"):
        heard.attention_over_layers()


def test_an_error_inside_leaves_no_hook():
    model = randomized("resnet", "light")
    before = hooks(model)
    for context in (recording(model), ablate(model, "layer1.0", head=0), ablate(model, "layer1.1")):
        with pytest.raises(RuntimeError), context:
            raise RuntimeError
    assert hooks(model) == before
    assert len(mixers(model)) == 16


@pytest.mark.unchecked
@torch.no_grad()
@pytest.mark.parametrize("how", ["torch.compile", "Module.compile"])
def test_compiled_networks_are_heard_and_cut_and_are_compiled_still(how):
    torch.compiler.reset()
    plain = randomized("resnet", "light")
    model = plain
    if how == "torch.compile":
        model = torch.compile(plain, backend="eager", fullgraph=True)
    else:
        plain.compile(backend="eager", fullgraph=True)
    x = images(plain)
    expected = model(x)
    with recording(model) as heard:
        model(x)
    with recording(copy.deepcopy(plain)) as twin:
        twin_of = copy.deepcopy(plain)
    with recording(twin_of) as twin:
        twin_of(x)
    for (_, found), (_, same) in zip(heard.attention_over_layers(), twin.attention_over_layers(), strict=True):
        assert torch.allclose(found, same, equal_nan=True, atol=1e-5)
    with ablate(model, "layer3.1"):
        without = model(x)
    assert not torch.allclose(without, expected, atol=1e-3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize(("method", "options"), FORMS)
@pytest.mark.parametrize("name", sweep_but(["vit"], NETWORKS))
@torch.no_grad()
def test_a_mixer_cut_is_as_if_it_were_removed(name, method, options, tmp_path):
    model = randomized(name, method, **options)
    x, expected = images(model), model(images(model))
    block = mixed_chains(model)[-1].mixers[0]
    places = {path: mixer.place for path, mixer in mixers(model).items()}
    expected = model(x)
    with ablate(model, block):
        without = model(x)
    assert {path: mixer.place for path, mixer in mixers(model).items()} == places
    assert torch.equal(model(x), expected)
    assert not torch.allclose(without, expected, atol=1e-3)
    removed = remove_mixers(copy.deepcopy(model), [block])
    assert torch.equal(removed(x), without)
    assert block not in mixers(removed)
    # Saved and loaded, and made by attach in the first place.
    assert torch.equal(mrla.load(mrla.save(removed, tmp_path))(x), without)
    again = mrla.attach(NETWORKS[name](), method, init="released", without=[block], **options)
    again.load_state_dict(removed.state_dict())
    assert torch.equal(again.eval()(x), without)
    found = {path: mixer.place for path, mixer in mixers(again).items()}
    assert found == {path: mixer.place for path, mixer in mixers(removed).items()}
    assert mrla.detach(removed)(x).shape == without.shape


@torch.no_grad()
def test_two_chains_in_one_container_stay_apart_when_the_head_of_the_second_goes():
    model = mrla.attach(timm.create_model("vit_tiny_patch16_224", depth=6, img_size=64, num_classes=3), "base",
                        chain_length=3, init="released").eval()  # fmt: skip
    chains = mixed_chains(model)
    assert [chain.mixers for chain in chains] == [
        tuple(f"blocks.{at}" for at in range(3)),
        tuple(f"blocks.{at}" for at in range(3, 5)),  # only the class token is read behind the last block
    ]
    x = torch.randn(2, 3, 64, 64)
    with ablate(model, "blocks.3"):
        without = model(x)
    removed = remove_mixers(copy.deepcopy(model), ["blocks.3"])
    assert torch.equal(removed(x), without)
    assert model.blocks[4].mrla.place == ChainPlace(1, 2, 0)
    assert removed.blocks[4].mrla.place.index == 0
    with recording(removed) as heard:
        removed(x)
    assert heard.attention_over_layers()[1][1].shape == (2, 12, 1, 2)


@torch.no_grad()
def test_links_and_heads_are_cut_as_the_mixers_do_it():
    model = randomized("resnet", "base", heads=2)
    x, expected = images(model), None
    with use("reference"):
        expected = model(x)
        for what in ({"lag": 2}, {"head": 1}):
            with ablate(model, "layer3.3", **what):
                once = model(x)
            assert not torch.allclose(once, expected, atol=1e-4)
            assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="lag must be from 1 to 3"), ablate(model, "layer3.3", lag=4):
        model(x)


def test_those_behind_move_up_and_nobody_else_is_last():
    """Only of the very last block are the patches unread."""
    places = {"a": ChainPlace(0, 2), "b": ChainPlace(1, 2), "c": ChainPlace(0, 2, 1), "d": ChainPlace(1, 2, 1)}
    assert close_up(places, ["b", "c", "d"]) == {"b": ChainPlace(0, 1), "c": places["c"], "d": places["d"]}
    assert close_up(places, ["a", "c"]) == {"a": ChainPlace(0, 1), "c": ChainPlace(0, 1, 0)}
    assert close_up(places, ["d"]) == {"d": ChainPlace(0, 1, 1)}


def test_a_key_or_query_is_not_used_where_its_block_is_alone_after_the_cut():
    model = remove_mixers(randomized("resnet", "base"), ["layer1.1", "layer1.2"])
    assert set(model.layer1[0].mrla.zero_grad_parameters()) == {"query_weight", "key_weight"}


def test_other_threads_may_run_it_meanwhile():
    model, errors = randomized("resnet", "light"), []
    x = images(model)

    def run():
        try:
            with torch.no_grad():
                model(x)
        except Exception as error:
            errors.append(error)

    with recording(model):
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_bad_calls():
    plain, model = timm.create_model("resnet18"), mrla.attach(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match=r"this ResNet has no mixers.*add them with mrla.attach"):
        mixed_chains(plain)
    with pytest.raises(ValueError, match="has no mixers"), recording(plain):
        pass
    with (
        pytest.raises(ValueError, match=r"block with a mixer must be named: got 'layer1.7'"),
        ablate(model, "layer1.7"),
    ):
        pass
    with pytest.raises(ValueError, match=r"got 'layer9'"):
        remove_mixers(model, ["layer9"])
    with pytest.raises(ValueError, match=r"a mixer must be left.*mrla.detach"):
        remove_mixers(model, list(mixers(model)))
    with pytest.raises(ValueError, match=r"without must name blocks.*'layer1.9'.*mrla.chains"):
        mrla.attach(plain, without=["layer1.9"])
    everything = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    with pytest.raises(ValueError, match="without must leave a block"):
        mrla.attach(plain, without=everything)
    assert not any(isinstance(module, MixedBlock) for module in plain.modules())
    assert len(mixers(mrla.attach(plain, without="layer1.0"))) == 7
