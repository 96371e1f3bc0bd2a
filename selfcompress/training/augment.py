"""From uint8 images to what a network sees: random crops, flips, cutout and normalisation."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import v2

Colours = tuple[float, float, float]

Policy = Literal["standard", "cutout", "autoaugment"]
"""How training images are changed; see `Augment`."""


def normalise(images: Tensor, mean: Colours, std: Colours) -> Tensor:
    """uint8 (B, 3, H, W) to float32 of the same shape, channels_last.

    `mean` and `std` are in units of images scaled to [0, 1].
    """
    # Not blocking, as a GPU would first be waited for.
    both = (255 * torch.tensor([mean, std])).to(images.device, non_blocking=True)
    centre, spread = both.view(2, 3, 1, 1)
    # Moving single bytes into channels_last is cheaper than moving floats.
    pixels = images.contiguous(memory_format=torch.channels_last).float()
    return pixels.sub_(centre).div_(spread)


@dataclass(frozen=True)
class Augment:
    """Random changes of whole batches of square images: uint8 to normalised float32.

    By the `policy` of `for_size`:

    - "standard": each image gets its own reflect-padded crop and horizontal flip, all at once for
      the batch, on its device.
    - "cutout": and a square that is cut out of it. Networks that are to be small learn less in a
      short run with it.
    - "autoaugment": zero padding, AutoAugment's CIFAR-10 policy, flip, crop and random erasing,
      image by image. Much slower.

    All chance comes from torch's global generators.
    """

    mean: Colours
    std: Colours
    pad: int = 4  # pixels on every side
    flip: bool = True
    cutout: int = 0  # side of the square, in pixels; 0 for none
    autoaugment: bool = False

    @classmethod
    def for_size(
        cls,
        image_size: int,
        mean: Colours,
        std: Colours,
        flip: bool = True,
        policy: Policy = "standard",
    ) -> "Augment":
        """The usual padding and cutout of 32 x 32 images, scaled down for smaller ones."""
        size = min(image_size, 32)
        cutout = size // 4 if policy == "cutout" else 0
        return cls(mean, std, size // 8, flip, cutout, policy == "autoaugment")

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) to normalised float32 (B, 3, S, S), channels_last."""
        if self.autoaugment:
            return normalise(self._autoaugment(images), self.mean, self.std)
        cropped = normalise(self._crop_and_flip(images), self.mean, self.std)
        # Cutting out after normalisation leaves exactly 0, the colour of the mean.
        return self._cut_out(cropped) if self.cutout else cropped

    def _crop_and_flip(self, images: Tensor) -> Tensor:
        """A random window of each image, reflect-padded and maybe mirrored: uint8, same shape."""
        count, _, _, size = images.shape
        padded = _reflect(_reflect(images, self.pad, dim=2), self.pad, dim=3)
        source = torch.arange(count, device=images.device)
        if self.flip:
            padded = torch.cat([padded, padded.flip(3)])
            source = source + count * torch.randint(2, (count,), device=images.device)
        # Every window of every image, (B or 2B, 3, 2 pad + 1, 2 pad + 1, S, S): a view, not a copy.
        windows = padded.unfold(2, size, 1).unfold(3, size, 1)
        top, left = torch.randint(2 * self.pad + 1, (2, count), device=images.device)
        return windows[source, :, top, left]

    def _cut_out(self, images: Tensor) -> Tensor:
        """Zeroes, in place, a random square that lies wholly inside each image."""
        count, _, _, size = images.shape
        start = torch.randint(size - self.cutout + 1, (2, count, 1), device=images.device)
        place = torch.arange(size, device=images.device)
        rows, columns = (start <= place) & (place < start + self.cutout)  # each (B, S)
        return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)

    def _autoaugment(self, images: Tensor) -> Tensor:
        """AutoAugment as published for CIFAR-10, image by image: uint8, same shape."""
        transform = v2.Compose(
            [
                v2.Pad(self.pad),
                v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
                v2.RandomHorizontalFlip(0.5 if self.flip else 0.0),
                v2.RandomCrop(images.shape[-1]),
                v2.RandomErasing(),
            ]
        )
        return torch.stack([transform(image) for image in images])


def _reflect(images: Tensor, pad: int, dim: int) -> Tensor:
    """Pads both ends of `dim` with its mirror image, as integers (F.pad reflects only floats)."""
    last = images.shape[dim] - 1
    place = torch.arange(-pad, last + pad + 1, device=images.device)
    return images.index_select(dim, last - (last - place.abs()).abs())
