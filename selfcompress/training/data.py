"""Datasets as uint8 images on the device, and batches of them.

A dataset's two splits are either resident (one tensor on the device) or streamed (read from disk
as they are needed). Both give the same batches in the same order for the same seed, so nothing
outside this module knows which kind it has.
"""

import os
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2

from selfcompress.text import first_line
from selfcompress.training.augment import Colours
from selfcompress.training.config import DatasetName
from selfcompress.training.errors import UserError

T = TypeVar("T")
READ_AT_ONCE = 256  # images per piece of work when a whole folder is read
CIFAR10_SIZE, DIGITS_SIZE = 32, 16  # pixels, unless others are asked for
MAX_WORKERS = 8  # processes that decode images
CIFAR10_LOCK = ".cifar10.lock"  # in its folder: held while it is downloaded


class DatasetUnavailableError(UserError):
    """The dataset is not on disk and cannot be downloaded."""


@dataclass(frozen=True)
class Files(torch.utils.data.Dataset[Tensor | UserError]):
    """Image files, decoded many at a time: what a worker process holds."""

    paths: list[str]
    image_size: int
    resize: bool  # or else refuse images of another size

    def __getitem__(self, indices: Tensor) -> Tensor | UserError:
        """uint8 images (B, 3, H, W) for int64 indices (B,)."""
        # Raised in a worker, an error would arrive as a traceback of many lines; returned, it is
        # raised in its one line by the process that asked.
        try:
            pixels = np.stack([self._pixels(self.paths[i]) for i in indices.tolist()])
        except UserError as error:
            return error
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def _pixels(self, path: str) -> np.ndarray:
        image, size = read_image(path), (self.image_size, self.image_size)
        if self.resize:
            image = image.resize(size, Image.Resampling.BILINEAR)  # PIL's always antialiases
        if image.size != size:
            raise UserError(
                f"{path} has {image.width}x{image.height} pixels instead of {size[0]}x{size[1]}; "
                "give --image-size to resize all images to one square size"
            )
        return np.asarray(image)


@dataclass(frozen=True)
class Split:
    """The training or the test images of a dataset, resident or streamed, and their labels."""

    images: Tensor | Files  # uint8 (N, 3, H, W) on the device, or where to read them from
    labels: Tensor  # int64 (N,) on the device

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def batches(
        self, batch_size: int, shuffle: bool = False, drop_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass of uint8 images (B, 3, H, W) and int64 labels (B,), both on the device.

        The order is drawn from torch's global CPU generator when the first batch is asked for;
        nothing else here touches that generator.
        """
        order = torch.randperm(len(self)) if shuffle else torch.arange(len(self))
        chosen = [i for i in order.split(batch_size) if len(i) == batch_size or not drop_last]
        for indices, images in zip(chosen, self._read(chosen), strict=True):
            yield images, self.labels[indices.to(self.labels.device, non_blocking=True)]

    def _read(self, chosen: list[Tensor]) -> Iterator[Tensor]:
        """The images (B, 3, H, W) for each of the batches of int64 CPU indices (B,)."""
        if isinstance(self.images, Tensor):
            device = self.images.device
            yield from (self.images[i.to(device, non_blocking=True)] for i in chosen)
            return
        loader: DataLoader[Tensor | UserError] = DataLoader(
            self.images,
            batch_size=None,  # what the sampler yields already is a batch
            sampler=chosen,
            num_workers=min(len(chosen), MAX_WORKERS, os.cpu_count() or 1),
            pin_memory=self.labels.is_cuda,
            generator=torch.Generator(),  # else it would draw from the global one
        )
        for images in loader:
            if isinstance(images, UserError):
                raise images
            yield images.to(self.labels.device, non_blocking=True)


@dataclass(frozen=True)
class Dataset:
    """Images to learn from and images to be judged by."""

    name: str  # what results are called
    classes: tuple[str, ...]
    train: Split  # empty if it was left out
    test: Split
    mean: Colours  # of the training images scaled to [0, 1], as is std; NaN without them
    std: Colours
    image_size: int  # pixels; images are square


def load(
    name: DatasetName,
    data_dir: Path,
    image_size: int | None,
    device: torch.device,
    streamed: bool | None = None,
    test_only: bool = False,
) -> Dataset:
    """The dataset `name`, its images resized to `image_size` pixels square if that is given.

    `streamed` is for "folder" only: whether to read images from disk as they are needed. By
    default a split is streamed if it takes more than a quarter of the device's memory.

    With `test_only` the training images are left out; a folder's need not be there then.
    """
    if name == "cifar10":
        return _cifar10(data_dir, image_size or CIFAR10_SIZE, device, test_only)
    if name == "digits":
        return _digits(image_size or DIGITS_SIZE, device, test_only)
    return _folder(data_dir, image_size, device, streamed, test_only)


def choose(asked: DatasetName | None, get: Callable[[DatasetName], T]) -> tuple[DatasetName, T]:
    """What `get` makes of the dataset asked for, or of digits if none was and CIFAR-10 fails.

    Raises:
        DatasetUnavailableError: the dataset asked for cannot be had.
    """
    name: DatasetName = asked or "cifar10"
    try:
        return name, get(name)
    except DatasetUnavailableError as unavailable:
        if asked is not None:
            raise
        print(
            f"WARNING: CIFAR-10 is unavailable ({unavailable}); TRAINING ON DIGITS INSTEAD "
            "(scikit-learn's handwritten digits): results are of digits, not of CIFAR-10",
            file=sys.stderr,
        )
        return "digits", get("digits")


def prepare(name: DatasetName, data_dir: Path, image_size: int | None) -> int:
    """Download what is missing of a dataset, without reading it: its image size in pixels.

    Raises:
        UserError: it cannot be had.
    """
    if name == "digits":
        return image_size or DIGITS_SIZE
    if name == "cifar10":
        _cifar10_part(data_dir, train=True)
        return image_size or CIFAR10_SIZE
    train, _ = _image_folders(data_dir)
    return image_size or read_image(train.samples[0][0]).width


def read_image(path: str) -> Image.Image:
    """An image file as RGB."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # PIL would clip them to 8 bits, nearly all to white
                raise ValueError(f"it has {image.mode}, not 8 bits a colour")
            return image.convert("RGB")
    except Exception as error:  # damaged files make PIL raise nearly anything
        raise UserError(
            f"{path} cannot be read as an image ({first_line(error)}): repair it or leave it out"
        ) from error


def _cifar10(data_dir: Path, image_size: int, device: torch.device, test_only: bool) -> Dataset:
    """CIFAR-10 from `data_dir`, downloaded first if need be."""
    wanted = (False,) if test_only else (True, False)
    parts = [_cifar10_part(data_dir, train) for train in wanted]
    splits = [
        _resized(torch.from_numpy(part.data).permute(0, 3, 1, 2), part.targets, image_size, device)
        for part in parts
    ]
    return _dataset("cifar10", parts[0].classes, splits, image_size)


def _cifar10_part(data_dir: Path, train: bool) -> CIFAR10:
    # The files are pickles; torchvision checks their MD5 sums before it opens them.
    try:
        return CIFAR10(data_dir, train)
    except RuntimeError:  # absent or damaged
        _download_cifar10(data_dir)
        return CIFAR10(data_dir, train)


def _download_cifar10(data_dir: Path) -> None:
    unpackable = check_integrity(data_dir / CIFAR10.filename, CIFAR10.tgz_md5)
    if not unpackable and not _reachable(CIFAR10.url):
        raise DatasetUnavailableError(
            f"no intact cifar10 in {data_dir}, and {CIFAR10.url} cannot be reached; "
            "download it where there is a network, or choose another dataset"
        )
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        # All processes write the same files: one downloads, the others wait and find them there,
        # as torchvision looks for intact ones first.
        with FileLock(data_dir / CIFAR10_LOCK):
            CIFAR10(data_dir, download=True)
    except Exception as error:  # the network, gzip, tar and MD5 sums each fail in their own ways
        raise DatasetUnavailableError(
            f"cifar10 could not be downloaded to {data_dir} ({' '.join(str(error).split())}); "
            "remove what is there and try again, or choose another dataset"
        ) from error


def _reachable(url: str, seconds: float = 10) -> bool:
    """Whether `url` answers within `seconds`."""
    answered = threading.Event()

    def ask() -> None:
        with suppress(Exception):  # whatever went wrong, there was no answer
            urllib.request.urlopen(url, timeout=seconds).close()
            answered.set()

    # Looking up a host's name heeds no timeout, but a daemon thread can be left behind at it.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def _digits(image_size: int, device: torch.device, test_only: bool) -> Dataset:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels, four fifths of them for training.

    The split is stratified and the same for every run, whatever the run's seed.
    """
    from sklearn.datasets import load_digits  # here because no other dataset needs scikit-learn
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (torch.from_numpy(digits.images) * (255 / 16)).round().to(torch.uint8)
    images = images[:, None].expand(-1, 3, -1, -1)
    parts = train_test_split(
        np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0
    )
    wanted = parts[1:] if test_only else parts
    splits = [_resized(images[i], digits.target[i].tolist(), image_size, device) for i in wanted]
    return _dataset("digits", list("0123456789"), splits, image_size)


def _resized(images: Tensor, labels: list[int], image_size: int, device: torch.device) -> Split:
    """A resident split of uint8 images (N, 3, H, W), resized (bilinear, antialiased) if need be."""
    images = v2.functional.resize(images.contiguous(), [image_size, image_size], antialias=True)
    return Split(images.to(device), torch.tensor(labels, device=device))


def _folder(
    data_dir: Path,
    image_size: int | None,
    device: torch.device,
    streamed: bool | None,
    test_only: bool,
) -> Dataset:
    """`data_dir`/train/CLASS/* and `data_dir`/test/CLASS/*."""
    parts = _image_folders(data_dir, test_only)
    size = image_size or read_image(parts[0].samples[0][0]).width
    splits: list[Split] = []
    for part in parts:
        labels = torch.tensor(part.targets, device=device)
        files = Files([path for path, _ in part.samples], size, resize=image_size is not None)
        split = Split(files, labels)
        stays = _fits(3 * size * size * len(split), device) if streamed is None else not streamed
        splits.append(_resident(split, size) if stays else split)
    return _dataset(data_dir.resolve().name, parts[0].classes, splits, size)


def _image_folders(data_dir: Path, test_only: bool = False) -> list[ImageFolder]:
    """The training and the test files, of the same classes."""
    wanted = ("test",) if test_only else ("train", "test")
    parts = [_image_folder(data_dir / part) for part in wanted]
    if parts[0].classes != parts[-1].classes:
        odd = min(set(parts[0].classes) ^ set(parts[-1].classes))
        raise UserError(
            f"only one of {data_dir}/train and {data_dir}/test has a folder {odd}; "
            "give both the same class folders"
        )
    return parts


def _image_folder(folder: Path) -> ImageFolder:
    """The image files below `folder`, which has one folder per class."""
    for needed in (folder.parent, folder):
        if not needed.is_dir():
            raise UserError(
                f"there is no folder {needed}: --data-dir is to hold train/CLASS and test/CLASS"
            )
    found = sum(entry.is_dir() for entry in folder.iterdir())
    if found < 2:
        raise UserError(
            f"{folder} has {'no class folders' if not found else 'a single class folder'}; "
            "put the images of each of two or more classes in a folder of its own"
        )
    images = ImageFolder(str(folder), allow_empty=True)
    empty = set(range(found)) - set(images.targets)
    if empty:
        where = folder / images.classes[min(empty)]
        raise UserError(f"there are no images in {where}; fill or remove that folder")
    return images


def _resident(split: Split, image_size: int) -> Split:
    """The streamed `split` with all of its images on the device."""
    shape = (len(split), 3, image_size, image_size)
    whole = torch.empty(shape, dtype=torch.uint8, device=split.labels.device)
    places = whole.split(READ_AT_ONCE)
    for place, (images, _) in zip(places, split.batches(READ_AT_ONCE), strict=True):
        place.copy_(images)
    return Split(whole, split.labels)


def _fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes are at most a quarter of the device's memory.

    On a GPU that is the memory free now; on a CPU it is all there is, since what is reported as
    free there leaves out the cache of files, which gives way.
    """
    if device.type == "cuda":
        memory, _ = torch.cuda.mem_get_info(device)
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return size <= memory // 4


def _dataset(name: str, classes: list[str], splits: list[Split], image_size: int) -> Dataset:
    """A dataset, its statistics taken in one pass over the training images, if they are there."""
    test = splits[-1]
    device = test.labels.device
    nothing = torch.empty(0, 3, image_size, image_size, dtype=torch.uint8, device=device)
    train = splits[0] if len(splits) > 1 else Split(nothing, test.labels[:0])
    # Counts of pixel values are exact, so the statistics depend on neither device nor batches.
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for images, _ in train.batches(READ_AT_ONCE):
        for channel in range(3):
            counts[channel] += torch.bincount(images[:, channel].flatten(), minlength=256).cpu()
    share = counts / counts.sum(1, keepdim=True)
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ value
    # Images of a single colour must not make normalisation divide by zero.
    std = (share @ value**2 - mean**2).clamp_min(1 / 255**2).sqrt()
    (r, g, b), (sr, sg, sb) = mean.tolist(), std.tolist()
    return Dataset(name, tuple(classes), train, test, (r, g, b), (sr, sg, sb), image_size)
