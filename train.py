"""Train a network that compresses itself while it trains.

    python train.py --gamma 0.01                        CIFAR-10 (downloaded), ResNet-9
    python train.py --gamma 0.01 --dataset digits       small real images, no network needed
    python train.py --target-size 150KB                 as small as that, instead of a γ
    python train.py --model resnet20                    another network; --help lists them
    python train.py --float                             the uncompressed baseline
    python train.py --dataset folder --data-dir DIR     DIR/train/CLASS/* and DIR/test/CLASS/*
    tensorboard --logdir runs                           watch it shrink

The same command, run again, resumes an interrupted run and skips a finished one.
"""

import os
import sys

import tyro

from models import UnknownModelError, build, default_width
from selfcompress import CutError
from selfcompress.training.config import Config
from selfcompress.training.errors import UserError, exit_code
from selfcompress.training.loop import run


def main() -> int:
    config = tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,))
    return exit_code(
        lambda: train(config),
        mistakes=(UnknownModelError,),
        failures=(CutError, FloatingPointError),
        stopped="stopped; the same command goes on after the last finished epoch",
        smaller="a smaller --batch-size or --width",
    )


def train(config: Config) -> int:
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        raise UserError("WORLD_SIZE is not 1: training on several devices is not supported")
    run(config, default_width(config.model), build)
    return 0


if __name__ == "__main__":
    sys.exit(main())
