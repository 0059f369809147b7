"""Shift, mirror, normalise; the order of images; the learning rate."""

import pytest
import torch

from fused_resnet.train.batches import TestBatches, TrainBatches
from fused_resnet.train.data import Augmentation, InMemory
from fused_resnet.train.schedule import Schedule
from fused_resnet.train.transforms import DRAWS, draw, normalise, seed_of, shift_and_flip
from tests.train import files


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("reach", [0, 3])
def test_shift_and_flip_is_pad_crop_and_mirror(reach: int, flip: bool) -> None:
    images, draws = files.random_images(32, 3, 9, 9), draw(32, "x")
    got = shift_and_flip(images, draws, Augmentation(shift=reach, flip=flip))
    places = set()
    for image, row, result in zip(images, draws.tolist(), got, strict=True):
        down, right = int(row[0] * (2 * reach + 1)), int(row[1] * (2 * reach + 1))
        padded = torch.zeros(3, 9 + 2 * reach, 9 + 2 * reach, dtype=torch.uint8)
        padded[:, reach : reach + 9, reach : reach + 9] = image
        expected = padded[:, down : down + 9, right : right + 9]
        if flip and row[2] < 0.5:
            expected = expected.flip(2)
        assert torch.equal(result, expected)
        places.add((down, right))
    assert len(places) == 1 if reach == 0 else len(places) > 10


def test_every_shift_is_as_likely() -> None:
    offsets = (draw(7000, "even")[:, 0] * 7).long().bincount(minlength=7)
    assert ((offsets - 1000).abs() < 150).all()


def test_draws_depend_on_every_part_of_the_seed() -> None:
    assert draw(4, 1, 2, 3).shape == (4, DRAWS)
    assert torch.equal(draw(4, 1, 2, 3), draw(4, 1, 2, 3))
    assert len({seed_of(*parts) for parts in ((1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (12, 3), (1, 23))}) == 6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_normalise(channels: int, channels_last: bool) -> None:
    images = files.random_images(2, channels, 5, 6)
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.4)
    got = normalise(images, mean, std, channels_last=channels_last)
    expected = (images.double().expand(2, 3, 5, 6) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert got.is_contiguous(memory_format=layout)


def _batches(count: int = 23, batch_size: int = 5, seed: int = 0) -> TrainBatches:
    images = torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1).expand(count, 1, 4, 4)
    split = InMemory(images, files.cycle(count, 10))
    return TrainBatches(split, batch_size, seed, Augmentation(shift=1), (0.0,) * 3, (1 / 255,) * 3)


def test_an_epoch_shows_each_image_once() -> None:
    batches = _batches()
    seen = [batch.indices for batch in batches.epoch(0)]
    assert [b.numel() for b in seen] == [5] * 4 == [5] * batches.steps_per_epoch
    assert len(set(torch.cat(seen).tolist())) == 20
    for batch in batches.epoch(0):
        # The pixel values are the image's number: images, labels and indices belong together.
        assert batch.images.amax((1, 2, 3)).tolist() == batch.indices.tolist()
        assert batch.labels.tolist() == (batch.indices % 10).tolist()


def test_the_order_is_a_function_of_seed_epoch_and_step() -> None:
    whole, resumed = list(_batches().epoch(3)), list(_batches().epoch(3, start=2))
    assert len(resumed) == 2
    for a, b in zip(whole[2:], resumed, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.images, b.images)

    def order(batches: TrainBatches, epoch: int) -> list[int]:
        return torch.cat([batch.indices for batch in batches.epoch(epoch)]).tolist()

    assert order(_batches(), 3) != order(_batches(), 4)
    assert order(_batches(), 3) != order(_batches(seed=1), 3)


def test_test_batches_show_everything_in_order() -> None:
    split = _batches().split
    seen = [batch.indices for batch in TestBatches(split, 5, (0.0,) * 3, (1.0,) * 3)]
    assert torch.cat(seen).tolist() == list(range(23))
    assert seen[-1].numel() == 3


def test_cosine_with_warmup() -> None:
    schedule = Schedule("cosine", 0.4, total_steps=100, warmup_steps=10)
    rates = [schedule(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.4 / 11)
    assert rates[10] == pytest.approx(0.4)
    assert rates[55] == pytest.approx(0.2)
    assert 0 < rates[99] < 0.001
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_step_and_constant() -> None:
    schedule = Schedule("step", 1.0, total_steps=100, milestones=(30, 60), gamma=0.1)
    assert [schedule(s) for s in (0, 29, 30, 59, 60, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert {Schedule("constant", 0.3, total_steps=9)(s) for s in range(9)} == {0.3}
