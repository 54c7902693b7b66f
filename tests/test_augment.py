import pytest
import torch

from fedftg.augment import augment


def flip_crop(images, rng):
    return augment(images, "flip_crop", rng)


def slow(images, rng, flips=True):
    """One image and one pixel at a time, from the same numbers; the padding is 12 / 8, 8 / 8 or 32 / 8 rounded up."""
    size, _, height, width = images.shape
    padding = {8: 1, 12: 2, 32: 4, 28: 4, 64: 8}[width]
    flipped = torch.rand(size, generator=rng) < 0.5 if flips else torch.zeros(size)
    cropped = torch.rand(size, generator=rng) < 0.5
    offsets = torch.randint(0, 2 * padding + 1, (size, 2), generator=rng)
    result = torch.zeros_like(images)
    for b in range(size):
        image = images[b].flip(-1) if flipped[b] else images[b]
        down, right = (int(offset) - padding for offset in offsets[b]) if cropped[b] else (0, 0)
        for y in range(height):
            for x in range(width):
                if 0 <= y + down < height and 0 <= x + right < width:
                    result[b, :, y, x] = image[:, y + down, x + right]
    return result


@pytest.mark.parametrize("shape", [(40, 3, 9, 12), (40, 1, 8, 8), (1, 3, 32, 32), (0, 3, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_equals_the_slow_way(shape, dtype):
    images = torch.randint(1, 255, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = images.clone()
    fast = flip_crop(images, torch.Generator().manual_seed(7))
    assert fast.dtype == dtype
    assert fast.is_contiguous()
    assert torch.equal(fast, slow(images, torch.Generator().manual_seed(7)))
    assert torch.equal(images, before)


@pytest.mark.parametrize("size", [8, 28, 64])
def test_crop_mirrors_nothing_and_flip_shifts_nothing(size):
    images = torch.randint(1, 255, (20, 1, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    chosen = torch.rand(20, generator=torch.Generator().manual_seed(3))[:, None, None, None] < 0.5
    mirrored = augment(images, "flip", torch.Generator().manual_seed(3))
    assert torch.equal(mirrored, torch.where(chosen, images.flip(-1), images))
    changed = augment(images, "crop", torch.Generator().manual_seed(3))
    assert torch.equal(changed, slow(images, torch.Generator().manual_seed(3), flips=False))
    assert not torch.equal(changed, images)


def test_none_draws_nothing():
    images, rng = torch.zeros(2, 1, 8, 8), torch.Generator().manual_seed(0)
    before = rng.get_state()
    assert augment(images, "none", rng) is images
    assert torch.equal(rng.get_state(), before)
