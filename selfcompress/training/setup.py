"""Set up a run: its device, its data, the name of its folder, its precision."""

from contextlib import AbstractContextManager
from pathlib import Path

import torch

from selfcompress.training.config import Config, DatasetName, gamma_name
from selfcompress.training.data import Dataset, choose, load
from selfcompress.training.errors import UserError
from selfcompress.training.filesize import FileSize


def load_data(config: Config, device: torch.device) -> tuple[DatasetName, Dataset]:
    """Load the dataset asked for, or digits if none was and CIFAR-10 is unavailable."""
    name, dataset = choose(
        config.dataset, lambda name: load(name, config.data_dir, config.image_size, device)
    )
    if dataset.image_size < 8:
        raise UserError(
            f"images of {dataset.image_size} pixels are too small: give --image-size 8 or more"
        )
    return name, dataset


def run_dir(config: Config, dataset: Dataset) -> Path:
    """Return the folder asked for, or one in runs/ named after the run's options."""
    if config.run_dir is not None:
        return config.run_dir
    if config.float_baseline:
        how = "float"
    elif config.target_size is not None:
        how = f"size{FileSize.parse(config.target_size)}"
    else:
        assert config.gamma is not None
        how = f"gamma{gamma_name(config.gamma)}"
    model = config.model.replace(":", "-")  # Windows allows no colons in file names
    width = "" if config.width is None else f"-w{config.width}"
    return Path("runs") / f"{dataset.name}-{model}{width}-{how}-seed{config.seed}"


def device_of(config: Config) -> torch.device:
    """Return the device asked for; auto is a GPU if there is one."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here")
    use_cuda = config.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")


def autocast_of(config: Config, device: torch.device) -> AbstractContextManager[None]:
    """Return a context of autocast to bfloat16, if that is asked for or, with auto, faster."""
    gains = device.type == "cuda" or (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    enabled = config.precision == "bf16" or (config.precision == "auto" and gains)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
