"""Where tokens learn their grid: of images of any shape, and of patches that come with their coordinates."""

import pytest
import timm
import torch

import mrla
from mrla.models.mixed_blocks import MixedBlock

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
NETWORKS = {
    "gemma4_vit_167m": {
        **SMALL,
        "head_dim": 16,
        "intermediate_size": 64,
        "position_embedding_size": 16,
        "pooling_kernel_size": 1,
    },
    "naflexvit_base_patch16_gap": SMALL,
}
PATCH = 16


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    model = mrla.attach(timm.create_model(request.param, **NETWORKS[request.param]).eval(), init="released")
    for name, parameter in model.named_parameters():
        if ".mrla." in name and parameter.ndim < 2:
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    return model


def grids_seen(model, *inputs, **keywords):
    """The grids that the mixers are told, each once, and the output."""
    seen = set()
    blocks = [module for module in model.modules() if isinstance(module, MixedBlock)]
    handles = [
        block.mrla.register_forward_pre_hook(lambda _, __, words: seen.add(words["grid"]), with_kwargs=True)
        for block in blocks
    ]
    try:
        with torch.no_grad():
            output = model(*inputs, **keywords)
    finally:
        for handle in handles:
            handle.remove()
    assert len(blocks) == 2
    return seen, output


def cut(image):
    """An image's patches and their coordinates, (b, n, 16 * 16 * 3) and (b, n, 2), as timm's NaFlex loader has them."""
    patches, (rows, columns) = timm.models.naflexvit.batch_patchify(image, (PATCH, PATCH))
    coordinates = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    valid = torch.ones(patches.shape[:2], dtype=torch.bool)
    return {"patches": patches, "patch_coord": coordinates.expand(len(image), -1, -1), "patch_valid": valid}


@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (3, 2), (2, 8), (8, 2), (1, 4), (4, 1)])
def test_the_grid_is_that_of_the_image_or_of_the_coordinates(network, grid):
    """Of 16 patches three grids are tried: only by what the network says can they be told apart."""
    image = torch.rand(2, 3, grid[0] * PATCH, grid[1] * PATCH)
    seen, expected = grids_seen(network, image)
    assert seen == {grid}
    seen, found = grids_seen(network, cut(image))
    assert seen == {grid}
    torch.testing.assert_close(found, expected)


@pytest.mark.unchecked
def test_a_compiled_graph_knows_the_grid_of_an_image(network):
    image = torch.rand(1, 3, 2 * PATCH, 8 * PATCH)
    compiled = torch.compile(network, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), network(image))


def padded(batch):
    wider = {name: torch.nn.functional.pad(value, (0, 0, 0, 4)) for name, value in batch.items() if value.ndim == 3}
    return {**wider, "patch_valid": torch.nn.functional.pad(batch["patch_valid"], (0, 4))}


def of_two_sizes(batch):
    """The second image's 16 patches lie in another grid."""
    other = torch.cartesian_prod(torch.arange(2), torch.arange(8))
    return {**batch, "patch_coord": torch.stack([batch["patch_coord"][0], other])}


def in_another_order(batch):
    order = torch.arange(16).flip(0)
    return {name: value[:, order] for name, value in batch.items()}


@pytest.mark.parametrize("change", [padded, of_two_sizes, in_another_order])
def test_patches_that_form_no_one_map_are_refused_by_name(network, change):
    batch = change(cut(torch.rand(2, 3, 4 * PATCH, 4 * PATCH)))
    with torch.no_grad(), pytest.raises(RuntimeError, match="did not say them: give the network images of one size"):
        network(batch)
