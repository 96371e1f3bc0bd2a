"""Datasets: errors that say what is wrong, batches that repeat with the seed, and augmentation."""

import hashlib
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10

from selfcompress.training.augment import Augment, Policy, normalise
from selfcompress.training.data import Dataset, DatasetUnavailableError, Split, load, prepare
from selfcompress.training.errors import UserError

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def folder(data_dir: Path, image_size: int | None = None, streamed: bool | None = False) -> Dataset:
    return load("folder", data_dir, image_size, CPU, streamed)


def paint(path: Path, size: tuple[int, int], seed: int, mode: str = "RGB") -> None:
    """Write an image of noise of `size` (width, height)."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).convert(mode).save(path)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Write images of cats and dogs and return their folder.

    There are 5 + 5 training images and 2 + 2 test images of 12 x 12 pixels.
    """
    for part, count in (("train", 5), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                paint(tmp_path / "pets" / part / name / f"{i}.png", (12, 12), seed=10 * label + i)
    return tmp_path / "pets"


def epoch(split: Split, seed: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    return list(split.batches(4, shuffle=True))


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(x.equal(u) and y.equal(v) for (x, y), (u, v) in pairs)


def noise(count: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def only_images(split: Split) -> Tensor:
    return torch.cat([images for images, _ in split.batches(1000)])


# digits


def test_digits_are_split_by_class_in_the_same_way_whatever_the_seed() -> None:
    torch.manual_seed(1)
    first = load("digits", Path(), None, CPU)
    torch.manual_seed(2)
    second = load("digits", Path(), None, CPU)
    assert (len(first.train), len(first.test)) == (1437, 360)
    for digit in range(10):
        test, train = ((s.labels == digit).sum().item() for s in (first.test, first.train))
        assert test / (test + train) == pytest.approx(0.2, abs=0.01)
    for a, b in ((first.train, second.train), (first.test, second.test)):
        assert only_images(a).equal(only_images(b)) and a.labels.equal(b.labels)


def test_digits_use_all_of_a_byte_and_normalise_to_unit_statistics() -> None:
    digits = load("digits", Path(), 8, CPU)
    images = only_images(digits.train)
    assert images.shape == (1437, 3, 8, 8) and images.dtype == torch.uint8
    assert images.min().item() == 0 and images.max().item() == 255
    normal = normalise(images, digits.mean, digits.std)
    assert normal.mean((0, 2, 3)).allclose(torch.zeros(3), atol=1e-4)
    assert normal.std((0, 2, 3)).allclose(torch.ones(3), atol=1e-4)


@pytest.mark.parametrize(("asked", "given"), [(None, 16), (24, 24)])
def test_digits_are_resized(asked: int | None, given: int) -> None:
    digits = load("digits", Path(), asked, CPU)
    assert digits.image_size == given
    assert only_images(digits.test).shape == (360, 3, given, given)


# folders


@pytest.mark.parametrize("streamed", [False, True])
def test_a_folder_gives_its_images_labels_and_names(pets: Path, streamed: bool) -> None:
    data = folder(pets, streamed=streamed)
    assert (data.name, data.classes, data.image_size) == ("pets", ("cat", "dog"), 12)
    assert (len(data.train), len(data.test)) == (10, 4)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5
    for path, image in zip(sorted(pets.glob("train/*/*")), only_images(data.train), strict=True):
        with Image.open(path) as saved:
            assert image.permute(1, 2, 0).flatten().tolist() == list(saved.tobytes())


def test_streamed_and_resident_splits_give_the_same_batches(pets: Path) -> None:
    resident, streamed = folder(pets, streamed=False), folder(pets, streamed=True)
    assert type(resident.train.images) is not type(streamed.train.images)
    assert same(epoch(resident.train, seed=3), epoch(streamed.train, seed=3))
    assert (resident.mean, resident.std) == (streamed.mean, streamed.std)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_seed_decides_the_order_and_no_more_is_drawn(pets: Path, streamed: bool) -> None:
    split = folder(pets, streamed=streamed).train
    assert same(epoch(split, seed=1), epoch(split, seed=1))
    after = torch.rand(1)
    assert not same(epoch(split, seed=1), epoch(split, seed=2))
    torch.manual_seed(1)
    torch.randperm(len(split))
    assert after.equal(torch.rand(1))


def test_every_image_comes_once_and_the_last_batch_may_be_dropped(pets: Path) -> None:
    split = folder(pets).train
    assert [len(labels) for _, labels in split.batches(4)] == [4, 4, 2]
    assert [len(labels) for _, labels in split.batches(4, drop_last=True)] == [4, 4]
    assert list(split.batches(11, drop_last=True)) == []
    shuffled = torch.cat([images for images, _ in epoch(split, seed=0)])
    assert shuffled.flatten(1).unique(dim=0).equal(only_images(split).flatten(1).unique(dim=0))


def test_images_of_other_modes_and_sizes_are_converted_when_a_size_is_given(pets: Path) -> None:
    paint(pets / "train" / "cat" / "grey.png", (9, 30), seed=0, mode="L")
    data = folder(pets, image_size=10)
    assert only_images(data.train).shape == (11, 3, 10, 10)


@pytest.mark.parametrize("asked", [None, 10])
def test_preparing_tells_the_image_size_that_loading_gives(pets: Path, asked: int | None) -> None:
    assert prepare("folder", pets, asked) == folder(pets, asked).image_size
    digits = load("digits", pets, asked, CPU)
    assert prepare("digits", pets, asked) == digits.image_size


def test_a_missing_data_dir(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere: --data-dir"):
        folder(tmp_path / "nowhere")


@pytest.mark.parametrize("streamed", [False, True])
def test_test_images_come_without_the_training_images(pets: Path, streamed: bool) -> None:
    whole = folder(pets, image_size=10, streamed=streamed)
    (pets / "train").rename(pets / "elsewhere")
    alone = load("folder", pets, 10, CPU, streamed, test_only=True)
    assert (alone.name, alone.classes, alone.image_size) == ("pets", ("cat", "dog"), 10)
    assert same(list(alone.test.batches(3)), list(whole.test.batches(3)))
    assert len(alone.train) == 0 and np.isnan(alone.mean).all() and np.isnan(alone.std).all()
    (pets / "test").rename(pets / "train")
    with pytest.raises(UserError, match=r"no folder .*test: --data-dir"):
        load("folder", pets, 10, CPU, streamed, test_only=True)


def test_digits_to_test_with_come_without_those_to_train_with() -> None:
    whole, alone = (load("digits", Path(), 8, CPU, test_only=only) for only in (False, True))
    assert same(list(alone.test.batches(100)), list(whole.test.batches(100)))
    assert len(alone.train) == 0


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_missing_part(pets: Path, part: str) -> None:
    (pets / part).rename(pets / "elsewhere")
    with pytest.raises(UserError, match=f"no folder .*{part}: --data-dir"):
        folder(pets)


def test_no_class_folders(tmp_path: Path) -> None:
    paint(tmp_path / "train" / "stray.png", (12, 12), seed=0)
    (tmp_path / "test").mkdir()
    with pytest.raises(UserError, match="train has no class folders"):
        folder(tmp_path)


def test_a_single_class(tmp_path: Path) -> None:
    for part in ("train", "test"):
        paint(tmp_path / part / "cat" / "0.png", (12, 12), seed=0)
    with pytest.raises(UserError, match="train has a single class folder"):
        folder(tmp_path)


def test_an_empty_class(pets: Path) -> None:
    (pets / "train" / "emu").mkdir()
    with pytest.raises(UserError, match=r"no images in .*emu"):
        folder(pets)


def test_classes_that_differ(pets: Path) -> None:
    paint(pets / "test" / "emu" / "0.png", (12, 12), seed=0)
    with pytest.raises(UserError, match=r"only one of .* has a folder emu"):
        folder(pets)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("content", [b"", b"no image", b"cut short"])
def test_an_unreadable_image(pets: Path, content: bytes, streamed: bool) -> None:
    victim = pets / "train" / "dog" / "3.png"
    victim.write_bytes(victim.read_bytes()[:200] if content == b"cut short" else content)
    with pytest.raises(UserError, match=r"dog/3\.png cannot be read as an image") as caught:
        folder(pets, streamed=streamed)
    assert len(str(caught.value).splitlines()) == 1


def test_images_of_16_bits_are_refused(pets: Path) -> None:
    ramp = np.linspace(0, 65535, 144).reshape(12, 12).astype(np.uint16)
    Image.fromarray(ramp).save(pets / "train" / "dog" / "3.png")
    with pytest.raises(UserError, match=r"dog/3\.png cannot be read .* not 8 bits a colour"):
        folder(pets)


@pytest.mark.parametrize("size", [(12, 13), (8, 8)])
def test_an_image_of_another_size(pets: Path, size: tuple[int, int]) -> None:
    paint(pets / "test" / "dog" / "1.png", size, seed=0)
    with pytest.raises(UserError, match=r"dog/1\.png has .* instead of 12x12; give --image-size"):
        folder(pets)


# cifar10


def test_cifar10_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def store(name: str, content: object) -> str:
        path = tmp_path / CIFAR10.base_folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return hashlib.md5(path.read_bytes()).hexdigest()

    images = noise(3, 32)
    batch = {"data": images.flatten(1).numpy(), "labels": [1, 0, 1]}
    meta = {"filename": "meta", "key": "names", "md5": store("meta", {"names": ["ape", "bus"]})}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    monkeypatch.setattr(CIFAR10, "train_list", [["a", store("a", batch)], ["b", store("b", batch)]])
    monkeypatch.setattr(CIFAR10, "test_list", [["c", store("c", batch)]])
    data = load("cifar10", tmp_path, None, CPU)
    assert (data.name, data.classes, data.image_size) == ("cifar10", ("ape", "bus"), 32)
    assert only_images(data.train).equal(torch.cat([images, images]))
    assert only_images(data.test).equal(images)
    assert data.train.labels.tolist() == [1, 0, 1] * 2
    assert only_images(load("cifar10", tmp_path, 16, CPU).test).shape == (3, 3, 16, 16)
    alone = load("cifar10", tmp_path, None, CPU, test_only=True)
    assert len(alone.train) == 0 and only_images(alone.test).equal(images)


def test_cifar10_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "url", "https://invalid.invalid/x")
    # A damaged earlier download must not be mistaken for the dataset.
    (tmp_path / CIFAR10.filename).write_bytes(b"cut short")
    start = time.monotonic()
    with pytest.raises(DatasetUnavailableError, match=r"invalid\.invalid.* cannot be reached"):
        load("cifar10", tmp_path, None, CPU)
    assert time.monotonic() - start < 12


def test_cifar10_that_does_not_survive_its_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "served"
    damaged.write_bytes(b"cut short")
    monkeypatch.setattr(CIFAR10, "url", damaged.as_uri())
    with pytest.raises(DatasetUnavailableError, match="could not be downloaded") as caught:
        load("cifar10", tmp_path / "data", None, CPU)
    assert len(str(caught.value).splitlines()) == 1


def test_cifar10_is_downloaded_once_if_two_miss_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, there = tmp_path / "served", tmp_path / "there"
    served.write_text("")
    downloads, both_miss_it = [], threading.Barrier(2, timeout=10)

    class StandIn:
        """Stands in for torchvision's class: refuses what is missing, and only notes downloads."""

        url, filename, tgz_md5 = served.as_uri(), "x.tar.gz", ""

        def __init__(self, root: Path, train: bool = True, download: bool = False) -> None:
            if download and not there.exists():
                downloads.append(root)
                time.sleep(0.2)  # meanwhile the other thread must not begin a download
                there.write_text("")
            if not there.exists():
                both_miss_it.wait()
                raise RuntimeError("Dataset not found or corrupted.")

    monkeypatch.setattr("selfcompress.training.data.CIFAR10", StandIn)
    with ThreadPoolExecutor(2) as threads:
        sizes = threads.map(lambda _: prepare("cifar10", tmp_path, None), range(2))
        assert list(sizes) == [32, 32]
    assert len(downloads) == 1


# augmentation


def holes(image: Tensor) -> tuple[int, int, int, int] | None:
    """Return (top, left, height, width) of the zeros of (3, H, W), None if no rectangle."""
    rows, columns = (image == 0).all(0).nonzero(as_tuple=True)
    top, left = int(rows.min()), int(columns.min())
    height, width = int(rows.max()) - top + 1, int(columns.max()) - left + 1
    return (top, left, height, width) if len(rows) == height * width else None


@pytest.mark.parametrize(
    ("policy", "size", "pad", "cutout"),
    [("standard", 32, 4, 0), ("standard", 16, 2, 0), ("cutout", 32, 4, 8), ("cutout", 16, 2, 4)],
)
def test_every_image_is_a_window_of_its_padded_self_perhaps_with_a_square_cut_out(
    policy: Policy, size: int, pad: int, cutout: int
) -> None:
    augment = Augment.for_size(size, MEAN, STD, policy=policy)
    assert (augment.pad, augment.cutout) == (pad, cutout)
    images = noise(64, size)
    torch.manual_seed(0)
    results = augment(images)
    padded = torch.nn.functional.pad(normalise(images, MEAN, STD), [pad] * 4, mode="reflect")

    crops, squares = set(), set()
    for result, before in zip(results, padded, strict=True):
        seen = torch.ones_like(result, dtype=torch.bool)
        if cutout:
            seen, square = result != 0, holes(result)
            assert square is not None and square[2:] == (cutout, cutout)
            squares.add(square)
        matches = [
            (flipped, top, left)
            for flipped in (False, True)
            for top in range(2 * pad + 1)
            for left in range(2 * pad + 1)
            for window in [(before.flip(2) if flipped else before)[:, top:, left:]]
            if window[:, :size, :size][seen].equal(result[seen])
        ]
        assert len(matches) == 1
        crops.add(matches[0])
    # Every image is changed in its own way.
    assert len(crops) > 30 and (len(squares) > 30) == bool(cutout)
    assert {flipped for flipped, _, _ in crops} == {False, True}
    reach = set(range(2 * pad + 1))
    assert {top for _, top, _ in crops} == reach == {left for _, _, left in crops}


def test_larger_images_are_padded_and_cut_out_like_those_of_32_pixels() -> None:
    assert Augment.for_size(224, MEAN, STD) == Augment.for_size(32, MEAN, STD)


def test_nothing_changes_but_the_scale_when_all_is_turned_off() -> None:
    images = noise(8, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    expected = (images / 255 - mean) / std
    off = Augment(MEAN, STD, pad=0, flip=False)
    for result in (normalise(images, MEAN, STD), off(images)):
        assert result.dtype == torch.float32
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert result.allclose(expected, atol=1e-5)


@pytest.mark.parametrize("policy", get_args(Policy))
def test_augmentation_repeats_with_its_seed_and_leaves_its_input_alone(policy: Policy) -> None:
    augment = Augment.for_size(32, MEAN, STD, policy=policy)
    images = noise(16, 32)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment(images))
    assert results[0].equal(results[1]) and not results[0].equal(results[2])
    assert results[0].shape == (16, 3, 32, 32) and results[0].dtype == torch.float32
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    assert images.equal(noise(16, 32))
