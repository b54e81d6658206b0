import os

import pytest
from torch.utils.data import BatchSampler

from mrla.data import Digits, loader
from mrla.data.sampling import PADDING, EpochSampler, SampleKey


def batches(**options) -> list[list]:
    epoch = options.pop("epoch", 0)
    sampler = EpochSampler(**options)
    sampler.set_epoch(epoch)
    grouped = list(BatchSampler(sampler, sampler.local_batch_size, drop_last=False))
    assert sum(map(len, grouped)) == len(sampler)
    return grouped


def indices(keys: list[SampleKey]) -> list[int]:
    return [key.index for key in keys]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [12, 13, 14, 17, 23, 24])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("drop_last", "pad"), [(True, False), (False, True), (False, False)])
def test_the_batches_of_all_processes_are_those_of_one(size, world_size, shuffle, drop_last, pad):
    options = {"size": size, "batch_size": 12, "seed": 3, "shuffle": shuffle, "drop_last": drop_last, "epoch": 2}
    one = batches(**options)
    ranks = [batches(**options, pad=pad, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({tuple(map(len, rank)) for rank in ranks}) == 1
    together = [[key for part in parts for key in part] for parts in zip(*ranks, strict=True)]
    full = size // 12
    assert together[:full] == one[:full]
    last = indices([key for batch in together[full:] for key in batch])
    rest = indices([key for batch in one[full:] for key in batch])
    if pad:
        assert last[: len(rest)] == rest
        assert set(last[len(rest) :]) <= {PADDING}
        assert len(last) - len(rest) < world_size
    else:
        assert last == rest[: len(rest) // world_size * world_size]


def test_drop_last_leaves_full_batches_only():
    assert [len(batch) for batch in batches(size=14, batch_size=4, drop_last=True)] == [4, 4, 4]


def test_padding_counts_nobody_twice():
    ranks = [batches(size=5, batch_size=4, pad=True, rank=rank, world_size=2) for rank in (0, 1)]
    seen = [index for rank in ranks for batch in rank for index in indices(batch) if index != PADDING]
    assert sorted(seen) == list(range(5))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("share", [1, 2, 7])
@pytest.mark.parametrize("size", [1, 4, 5, 29, 30, 31])
@pytest.mark.parametrize("shuffle", [False, True])
def test_with_padding_every_sample_comes_once_and_padding_comes_last(world_size, share, size, shuffle):
    options = {"size": size, "batch_size": share * world_size, "shuffle": shuffle, "pad": True, "epoch": 3}
    ranks = [batches(**options, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = [[key.index for part in parts for key in part] for parts in zip(*ranks, strict=True)]
    seen = [index for batch in together for index in batch]
    real = [index for index in seen if index != PADDING]
    assert sorted(real) == list(range(size))
    assert seen[:size] == real
    assert len(together) == -(-size // (share * world_size))
    assert not any(PADDING in batch for batch in together[:-1])
    if not shuffle:
        assert real == list(range(size))


def test_a_sampler_can_be_iterated_again_and_set_back():
    sampler = EpochSampler(size=50, batch_size=10, shuffle=True)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert indices(list(sampler)) != indices(first)
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_the_order_is_a_function_of_seed_and_epoch():
    options = {"size": 50, "batch_size": 50, "shuffle": True}
    order = batches(**options, seed=1, epoch=4)[0]
    assert batches(**options, seed=1, epoch=4)[0] == order
    assert sorted(indices(order)) == list(range(50))
    assert {key.epoch for key in order} == {4}
    assert indices(batches(**options, seed=1, epoch=5)[0]) != indices(order)
    assert indices(batches(**options, seed=2, epoch=4)[0]) != indices(order)


def test_a_batch_must_divide_by_the_processes():
    with pytest.raises(ValueError, match=r"batch_size=10 for 4 processes; try 8$"):
        EpochSampler(size=100, batch_size=10, world_size=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 7, "batch_size": 8, "drop_last": True}, "got 7 samples, 8 are needed"),
        ({"size": 0, "batch_size": 8, "pad": True}, "got 0 samples, 1 are needed"),
        ({"size": 1, "batch_size": 8, "world_size": 2}, "got 1 samples, 2 are needed"),
        ({"size": 7, "batch_size": 0}, "batch_size must be a positive multiple"),
    ],
)
def test_no_batch_at_all_is_refused(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        EpochSampler(**options)
    assert "\n" not in str(caught.value)


def test_more_workers_than_cores_are_no_warning():
    batches = loader(Digits().open("val"), batch_size=256, workers=(os.cpu_count() or 1) + 1)
    assert len(list(batches)) == len(batches)
