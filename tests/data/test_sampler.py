"""The order of samples: by seed and epoch, dealt to ranks, taken up again in the middle of an epoch."""

from collections import Counter

import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from torch.utils.data import BatchSampler, DataLoader, Dataset

from llava.data.sampler import FILLER, EpochSampler, Place
from llava.errors import ConfigError


class Echo(Dataset[Place]):
    """Gives back what it is asked for."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, place: Place) -> Place:
        return place


def order(seed: int, epoch: int, length: int = 23, **options: int | bool) -> list[int]:
    sampler = EpochSampler(length, seed, **options)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    places = list(sampler)
    assert len(places) == len(sampler) and {place.epoch for place in places} == {epoch}
    return [place.index for place in places]


def test_the_order_is_that_of_seed_and_epoch_alone():
    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    assert sorted(order(1, 7)) == list(range(23))
    assert order(1, 7, shuffle=False) == list(range(23))
    assert order(5, 2, length=8) == [2, 1, 3, 6, 0, 5, 7, 4]  # for ever: runs are resumed years later


def test_an_epoch_that_has_begun_keeps_its_number():
    sampler = EpochSampler(3)
    places = iter(sampler)
    first = next(places)
    sampler.set_epoch(4)
    assert {place.epoch for place in (first, *places)} == {0}


def shards(processes: int, multiple_of: int, epoch: int, batch: int = 2) -> list[list[list[Place]]]:
    """The batches of each rank."""
    found = []
    for rank in range(processes):
        sampler = EpochSampler(23, 3, multiple_of=multiple_of)
        sampler.set_epoch(epoch)
        found.append(list(BatchSamplerShard(BatchSampler(sampler, batch, False), processes, rank)))
    return found


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_ranks_take_every_sample_once_in_as_many_steps(processes: int):
    filled = shards(processes, multiple_of=2 * processes, epoch=1)
    counts = Counter(place.index for rank in filled for batch in rank for place in batch)
    fillers = counts.pop(FILLER, 0)
    assert counts == dict.fromkeys(range(23), 1) and fillers == -23 % (2 * processes)
    assert len({len(rank) for rank in filled}) == 1
    # dealt in turns, the ranks' batches are the one order
    turns = [place.index for batches in zip(*filled, strict=True) for batch in batches for place in batch]
    assert turns[:23] == order(3, 1)
    repeated = Counter(p.index for rank in shards(processes, 1, epoch=1) for batch in rank for p in batch)
    assert set(repeated) == set(range(23)) and max(repeated.values()) <= 2


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_taken_up_where_it_was_left(processes: int, workers: int):
    def loader() -> tuple[DataLoaderShard, EpochSampler]:
        sampler = EpochSampler(23, 3)
        batches = BatchSamplerShard(BatchSampler(sampler, 2, False), processes, processes - 1)
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        return DataLoaderShard(Echo(), batch_sampler=batches, collate_fn=list, **options), sampler

    whole, sampler = loader()
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)  # accelerate's own set_epoch does not reach it behind a skip and a shard
        whole.set_epoch(epoch)
        epochs.append(list(whole))
    assert [{p.epoch for batch in batches for p in batch} for batches in epochs] == [{0}, {1}, {2}]
    again, sampler = loader()
    rest = skip_first_batches(again, 3)
    sampler.set_epoch(2)
    rest.set_epoch(2)
    assert list(rest) == epochs[2][3:]


def test_workers_that_stay_see_the_epoch():
    sampler = EpochSampler(23, 3)
    loader = DataLoader(Echo(), 4, sampler=sampler, num_workers=2, persistent_workers=True, collate_fn=list)
    for epoch in (0, 1, 5):
        sampler.set_epoch(epoch)
        assert [place for batch in loader for place in batch] == [Place(i, epoch) for i in order(3, epoch)]


def test_nothing_to_sample_from_is_refused():
    with pytest.raises(ConfigError, match="length=0"):
        EpochSampler(0)
