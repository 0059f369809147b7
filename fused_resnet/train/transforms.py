"""From stored bytes to what the network sees: shift, mirror, normalise. All randomness comes in as numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_resnet.train.data.split import Augmentation

# Random numbers per image: shift down, shift right, mirror, and the crop's area, aspect, top, left.
DRAWS = 7


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed made from `parts`, well mixed: neighbouring epochs or steps share nothing."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def draw(count: int, *parts: int | str) -> Tensor:
    """(count, DRAWS) numbers in [0, 1), the same whenever `parts` (seed, epoch, step) are the same."""
    return torch.rand(count, DRAWS, generator=torch.Generator().manual_seed(seed_of(*parts)))


def shift_and_flip(images: Tensor, draws: Tensor, augment: Augmentation) -> Tensor:
    """Shifts each image by up to `augment.shift` pixels, black moving in, and mirrors about half of them.

    Args:
        images: (B, C, S, S) uint8.
        draws: (B, DRAWS) numbers in [0, 1).

    Returns:
        (B, C, S, S) uint8, channels_last in memory.
    """
    if augment.shift == 0 and not augment.flip:
        return images
    count, _, height, width = images.shape
    reach = augment.shift
    padded = torch.nn.functional.pad(images, (reach, reach, reach, reach))
    offsets = (draws[:, :2] * (2 * reach + 1)).long()
    rows = offsets[:, :1] + torch.arange(height)
    columns = torch.arange(width).expand(count, width)
    if augment.flip:
        columns = torch.where(draws[:, 2:3] < 0.5, columns.flip(1), columns)
    columns = offsets[:, 1:2] + columns
    # One gather does it all; its result is (B, S, S, C), which is channels_last already.
    moved = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float], *, channels_last: bool = True) -> Tensor:
    """(B, 1 or 3, S, S) uint8 to (B, 3, S, S) fp32 with the given channel mean and deviation taken out."""
    # float64 constants once, so that the result does not depend on the order of the two roundings.
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32).view(1, 3, 1, 1)
    offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32).view(1, 3, 1, 1)
    result = images.float().mul(scale).add_(offset)
    return result.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
