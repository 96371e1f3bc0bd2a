"""Turn uint8 images into network inputs: random crops, flips, cutout and normalisation."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import v2

Colours = tuple[float, float, float]

Policy = Literal["standard", "cutout", "autoaugment"]
"""How training images are augmented; see `Augment`."""


def normalise(images: Tensor, mean: Colours, std: Colours) -> Tensor:
    """Normalise uint8 images (B, 3, H, W) to float32 of the same shape, channels_last.

    `mean` and `std` are those of images scaled to [0, 1].
    """
    # A blocking copy would wait for the GPU.
    both = (255 * torch.tensor([mean, std])).to(images.device, non_blocking=True)
    centre, spread = both.view(2, 3, 1, 1)
    # Converting bytes to channels_last is cheaper than converting floats.
    pixels = images.contiguous(memory_format=torch.channels_last).float()
    return pixels.sub_(centre).div_(spread)


@dataclass(frozen=True)
class Augment:
    """Augments and normalises batches of square images: uint8 to float32.

    The `policy` of `for_size` is one of:

    - "standard": each image gets its own reflect-padded crop and horizontal flip, computed for the
      whole batch at once, on its device.
    - "cutout": the same, and a random square of each image is set to the mean colour. In a short
      run, networks that are compressed to a small size learn less with it.
    - "autoaugment": zero padding, AutoAugment's CIFAR-10 policy, flip, crop and random erasing,
      image by image. Much slower.

    All random numbers come from torch's global generators.
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
        """Return the usual padding and cutout of 32 x 32 images, scaled down for smaller ones."""
        size = min(image_size, 32)
        cutout = size // 4 if policy == "cutout" else 0
        return cls(mean, std, size // 8, flip, cutout, policy == "autoaugment")

    def __call__(self, images: Tensor) -> Tensor:
        """Augment uint8 (B, 3, S, S) and normalise to float32 (B, 3, S, S), channels_last."""
        if self.autoaugment:
            return normalise(self._autoaugment(images), self.mean, self.std)
        cropped = normalise(self._crop_and_flip(images), self.mean, self.std)
        # Cutout comes after normalisation, where the mean colour is exactly 0.
        return self._cut_out(cropped) if self.cutout else cropped

    def _crop_and_flip(self, images: Tensor) -> Tensor:
        """Crop each reflect-padded image at random; with `flip`, also mirror half of them."""
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
        """Set a random square, which lies wholly inside each image, to 0, in-place."""
        count, _, _, size = images.shape
        start = torch.randint(size - self.cutout + 1, (2, count, 1), device=images.device)
        place = torch.arange(size, device=images.device)
        rows, columns = (start <= place) & (place < start + self.cutout)  # each (B, S)
        return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)

    def _autoaugment(self, images: Tensor) -> Tensor:
        """Apply AutoAugment as published for CIFAR-10, image by image: uint8, same shape."""
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
    """Reflect-pad both ends of `dim` of integer images (F.pad reflects only floats)."""
    last = images.shape[dim] - 1
    place = torch.arange(-pad, last + pad + 1, device=images.device)
    return images.index_select(dim, last - (last - place.abs()).abs())
