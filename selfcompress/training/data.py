"""Datasets of uint8 images, and batches of them on the device.

A dataset's two splits are either resident (one tensor on the device) or streamed (read from disk
as they are needed). Both give the same batches in the same order for the same seed, so no other
module needs to know which kind it has.
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
READ_AT_ONCE = 256  # images per batch when all images of a split are read
CIFAR10_SIZE, DIGITS_SIZE = 32, 16  # default image sizes in pixels
MAX_WORKERS = 8  # processes that decode images
CIFAR10_LOCK = ".cifar10.lock"  # file in the data folder that is locked during a download


class DatasetUnavailableError(UserError):
    """The dataset is not on disk and cannot be downloaded."""


@dataclass(frozen=True)
class Files(torch.utils.data.Dataset[Tensor | UserError]):
    """Image files, which worker processes decode many at a time."""

    paths: list[str]
    image_size: int
    resize: bool  # False: raise UserError for images of another size

    def __getitem__(self, indices: Tensor) -> Tensor | UserError:
        """Return uint8 images (B, 3, H, W) for int64 indices (B,), or an error in reading them."""
        # An error raised in a worker would arrive as a traceback of many lines; returned, it is
        # raised with its one-line message by the process that reads the batches.
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
        """Yield one pass of uint8 images (B, 3, H, W) and int64 labels (B,), both on the device.

        The order is drawn from torch's global CPU generator when the first batch is asked for;
        nothing else here touches that generator.
        """
        order = torch.randperm(len(self)) if shuffle else torch.arange(len(self))
        chosen = [i for i in order.split(batch_size) if len(i) == batch_size or not drop_last]
        for indices, images in zip(chosen, self._read(chosen), strict=True):
            yield images, self.labels[indices.to(self.labels.device, non_blocking=True)]

    def _read(self, chosen: list[Tensor]) -> Iterator[Tensor]:
        """Yield the images (B, 3, H, W) of each batch in `chosen`, int64 CPU indices (B,)."""
        if isinstance(self.images, Tensor):
            device = self.images.device
            yield from (self.images[i.to(device, non_blocking=True)] for i in chosen)
            return
        loader: DataLoader[Tensor | UserError] = DataLoader(
            self.images,
            batch_size=None,  # the sampler already yields whole batches
            sampler=chosen,
            num_workers=min(len(chosen), MAX_WORKERS, os.cpu_count() or 1),
            pin_memory=self.labels.is_cuda,
            generator=torch.Generator(),  # else it would draw from torch's global generator
        )
        for images in loader:
            if isinstance(images, UserError):
                raise images
            yield images.to(self.labels.device, non_blocking=True)


@dataclass(frozen=True)
class Dataset:
    """The training and the test images of a dataset."""

    name: str  # used in names of runs and in results
    classes: tuple[str, ...]
    train: Split  # empty if only the test images were loaded
    test: Split
    mean: Colours  # mean and std are of training images scaled to [0, 1]; NaN without any
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
    """Load the dataset `name`.

    Args:
        data_dir: where cifar10 is or is downloaded to; of "folder", the folder to read.
        image_size: pixels, to which images are resized. None is 32 for cifar10 and 16 for digits;
            a folder's images, which must then be of one square size, stay as they are.
        streamed: of "folder", whether to read images from disk as they are needed. None streams
            a split that takes more than a quarter of the device's memory.
        test_only: leave the training images out; a folder need not have any then.

    Raises:
        UserError: the dataset is unavailable, or a folder of images is unsuitable.
    """
    if name == "cifar10":
        return _cifar10(data_dir, image_size or CIFAR10_SIZE, device, test_only)
    if name == "digits":
        return _digits(image_size or DIGITS_SIZE, device, test_only)
    return _folder(data_dir, image_size, device, streamed, test_only)


def choose(asked: DatasetName | None, get: Callable[[DatasetName], T]) -> tuple[DatasetName, T]:
    """Return the name of the dataset to use and what `get` returns for it.

    That is the dataset asked for; None is cifar10 or, after a warning, digits if cifar10 is
    unavailable.

    Raises:
        DatasetUnavailableError: the dataset asked for is unavailable.
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
    """Download a dataset if it is missing, and return its image size in pixels.

    Raises:
        UserError: the dataset is unavailable, or a folder of images is unsuitable.
    """
    if name == "digits":
        return image_size or DIGITS_SIZE
    if name == "cifar10":
        _cifar10_part(data_dir, train=True)
        return image_size or CIFAR10_SIZE
    train, _ = _image_folders(data_dir)
    return image_size or read_image(train.samples[0][0]).width


def read_image(path: str) -> Image.Image:
    """Read an image file as RGB; raises UserError if that fails."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # PIL would clip values to 8 bits, nearly all to white
                raise ValueError(f"it has {image.mode}, not 8 bits a colour")
            return image.convert("RGB")
    except Exception as error:  # for damaged files PIL raises many types of errors
        raise UserError(
            f"{path} cannot be read as an image ({first_line(error)}): repair it or leave it out"
        ) from error


def _cifar10(data_dir: Path, image_size: int, device: torch.device, test_only: bool) -> Dataset:
    """Load CIFAR-10 from `data_dir`, downloading it first if need be."""
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
        # All processes write the same files, so one downloads while the others wait. These then
        # download nothing, as torchvision looks for intact files first.
        with FileLock(data_dir / CIFAR10_LOCK):
            CIFAR10(data_dir, download=True)
    except Exception as error:  # network, gzip, tar and MD5 failures are of various types
        raise DatasetUnavailableError(
            f"cifar10 could not be downloaded to {data_dir} ({' '.join(str(error).split())}); "
            "remove what is there and try again, or choose another dataset"
        ) from error


def _reachable(url: str, seconds: float = 10) -> bool:
    """Whether `url` answers within `seconds`."""
    answered = threading.Event()

    def ask() -> None:
        with suppress(Exception):  # after any error, there was no answer
            urllib.request.urlopen(url, timeout=seconds).close()
            answered.set()

    # The lookup of the host's name ignores the timeout, but a daemon thread can be abandoned.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def _digits(image_size: int, device: torch.device, test_only: bool) -> Dataset:
    """Load scikit-learn's 1797 handwritten digits of 8x8 pixels, four fifths of them for training.

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
    """Make a resident split of uint8 images (N, 3, H, W), resized (bilinear, antialiased)."""
    images = v2.functional.resize(images.contiguous(), [image_size, image_size], antialias=True)
    return Split(images.to(device), torch.tensor(labels, device=device))


def _folder(
    data_dir: Path,
    image_size: int | None,
    device: torch.device,
    streamed: bool | None,
    test_only: bool,
) -> Dataset:
    """Load the images in `data_dir`/train/CLASS/* and `data_dir`/test/CLASS/*."""
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
    """List the training and the test files, after checking that their classes are the same."""
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
    """List the image files in `folder`, which must have at least two class folders, none empty."""
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
    """Read all images of a streamed `split` and return it as a resident one."""
    shape = (len(split), 3, image_size, image_size)
    whole = torch.empty(shape, dtype=torch.uint8, device=split.labels.device)
    places = whole.split(READ_AT_ONCE)
    for place, (images, _) in zip(places, split.batches(READ_AT_ONCE), strict=True):
        place.copy_(images)
    return Split(whole, split.labels)


def _fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes are at most a quarter of the device's memory.

    On a GPU that is the memory free now; on a CPU it is all physical memory, since what is
    reported as free there excludes the file cache, which the system would release.
    """
    if device.type == "cuda":
        memory, _ = torch.cuda.mem_get_info(device)
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return size <= memory // 4


def _dataset(name: str, classes: list[str], splits: list[Split], image_size: int) -> Dataset:
    """Make a dataset, with the statistics of its training images, if there are any."""
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
