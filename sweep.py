"""Train a network for every γ and seed, and see how accuracy falls with size.

    python sweep.py --gammas 0.001 0.01 0.1 --seeds 3 --jobs 2      any option of train.py besides
    python sweep.py --gamma-range 0.001 0.3 --points 8              γ in equal ratios
    python sweep.py --gammas 0.01 0.1 --list                        the runs' commands, one a line
    tensorboard --logdir runs/SWEEP                                 all runs; see HPARAMS

A sweep's folder ends up with results.csv, curve.png and .svg, more figures, and report.html. The
same command, run again, finishes interrupted runs and tries failed ones again.
"""

import sys
from pathlib import Path

import tyro

from models import UnknownModelError, default_width
from selfcompress.sweeping.sweep import Sweep, run
from selfcompress.training.errors import exit_code


def main() -> int:
    train = Path(__file__).resolve().with_name("train.py")
    sweep = tyro.cli(Sweep, config=(tyro.conf.FlagCreatePairsOff,))
    return exit_code(
        lambda: run(sweep, default_width(sweep.model), train),
        mistakes=(UnknownModelError,),
        stopped="stopped; the same command finishes what is missing",
    )


if __name__ == "__main__":
    sys.exit(main())
