"""A sweep: one ordinary run of train.py for every γ and seed, and a report of all results."""

import dataclasses
import json
import os
import shlex
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from selfcompress.disk import is_left_over
from selfcompress.sweeping import curves
from selfcompress.sweeping.page import REPORT, write_page
from selfcompress.sweeping.pool import cores, run_all
from selfcompress.sweeping.progress import Progress
from selfcompress.sweeping.results import Result, read, read_all, write_csv
from selfcompress.training import runs
from selfcompress.training.config import COMPRESSION, MAX_GAMMA, Config, gamma_name
from selfcompress.training.data import choose, prepare
from selfcompress.training.errors import UserError
from selfcompress.training.lock import LOCK, hold

LOGS = "logs"
CSV = "results.csv"
_FILES = (CSV, REPORT, *curves.FILES)


@dataclass(frozen=True)
class Sweep(Config):
    """Train a network for every γ and seed, and the float baseline, and draw size against accuracy.

    The same command again finishes what is missing. All other options are those of train.py.
    """

    gammas: tuple[float, ...] = ()
    """The γ to try, such as 0.001 0.01 0.1."""
    gamma_range: tuple[float, float] | None = None
    """Or a smallest and a largest γ, between which --points γ are spaced in equal ratios."""
    points: int = 8
    """Number of γ in --gamma-range."""
    seeds: int = 3
    """Runs for each γ, with the seeds 0, 1, …"""
    jobs: int = 1
    """Runs at a time; they share the cores, and the GPUs if there are any."""
    list_commands: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Print the command of every run, one per line, and run none."""
    run_dir: Path | None = None
    """Folder of the sweep. None makes a name from the options, in runs/."""
    # The options that a sweep sets itself.
    gamma: tyro.conf.Suppress[tyro.conf.Fixed[float | None]] = None
    target_size: tyro.conf.Suppress[tyro.conf.Fixed[str | None]] = None
    seed: tyro.conf.Suppress[tyro.conf.Fixed[int]] = Config.seed
    float_baseline: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False
    overwrite: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False

    def validate(self) -> None:
        """Raise UserError, with a one-line message, for options that cannot be run."""
        super().validate()
        low, high = self.gamma_range or (1.0, 1.0)
        checks = [
            (bool(self.gammas or self.gamma_range), "give some --gammas, or a --gamma-range"),
            (
                all(0 <= g <= MAX_GAMMA for g in self.gammas),
                f"--gammas must be numbers from 0 to {MAX_GAMMA:g}",
            ),
            (
                0 < low <= high <= MAX_GAMMA,
                f"--gamma-range must be two numbers above 0, LO ≤ HI ≤ {MAX_GAMMA:g}",
            ),
            (self.points >= 2, "--points must be at least 2"),
            (self.seeds >= 1, "--seeds must be at least 1"),
            (self.jobs >= 1, "--jobs must be at least 1"),
        ]  # fmt: skip
        for holds, message in checks:
            if not holds:
                raise UserError(message)

    def all_gammas(self) -> dict[str, float]:
        """Return every γ once, ascending, by its name; those of the range have three digits."""
        ranged = () if self.gamma_range is None else np.geomspace(*self.gamma_range, self.points)
        values = sorted([*self.gammas, *(float(f"{gamma:.3g}") for gamma in ranged)])
        return {gamma_name(gamma): gamma for gamma in values}


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep.

    Attributes:
        root: the sweep's folder.
        configs: the options of the runs, as given to train.py, in the order in which they start.
        resolved: the options that all runs share, with all defaults filled in.
    """

    root: Path
    configs: tuple[Config, ...]
    resolved: Config

    @property
    def folders(self) -> dict[str, Path]:
        """The runs' folders, by name."""
        return {config.run_dir.name: config.run_dir for config in self.configs if config.run_dir}

    def scripts(self, train: Path) -> dict[str, list[str]]:
        """Return the command of every run by name, without the interpreter; `train` is train.py."""
        return {
            name: [str(train), *arguments(config)]
            for name, config in zip(self.folders, self.configs, strict=True)
        }

    def done(self) -> list[Result]:
        """Return the runs that are finished.

        Raises:
            UserError: the folder is not this sweep's, or holds runs of other options.
        """
        names = {file.name for file in self.root.iterdir()} if self.root.exists() else set()
        there = sorted(self.root.glob(f"*/{runs.CONFIG}"))
        ours = not names - {LOCK} or LOGS in names or there
        if runs.CONFIG in names or not ours:
            raise UserError(
                f"{self.root} holds files but no sweep's runs; choose another --run-dir"
            )
        for file in there:
            self._require_ours(file)
        return [result for folder in self.folders.values() if (result := read(folder))]

    def _require_ours(self, file: Path) -> None:
        try:
            there = json.loads(file.read_text())
            same = {
                "gamma": there["gamma"],
                "seed": there["seed"],
                "float_baseline": there["float"],
            }
            here = dataclasses.replace(self.resolved, **same).as_json()
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is no run's, or damaged: choose another --run-dir, or, if it is of this "
                f"sweep, remove {file.parent}"
            ) from error
        if (other := runs.difference(there, here)) is not None:
            raise UserError(
                f"{file.parent} is a run with other options ({other}); choose another --run-dir"
            )


def plan(sweep: Sweep, default_width: int | None) -> Plan:
    """Plan the runs of `sweep`, one seed after the other, and download its dataset if need be.

    Args:
        default_width: default width of the model; None if it cannot be chosen.

    Raises:
        UserError: the sweep cannot be run.
    """
    sweep.validate()
    common = Config(**{f.name: getattr(sweep, f.name) for f in dataclasses.fields(Config)})
    dataset, size = choose(sweep.dataset, lambda d: prepare(d, sweep.data_dir, sweep.image_size))
    common = dataclasses.replace(common, dataset=dataset)
    resolved = common.resolved(dataset, size, default_width)
    baseline = dataclasses.replace(
        common, float_baseline=True, **{f: getattr(Config, f) for f in COMPRESSION}
    )
    root = sweep.run_dir or _root(resolved)
    configs = []
    for seed in range(sweep.seeds):
        kinds = {"float": baseline}
        for name, gamma in sweep.all_gammas().items():
            kinds[f"gamma{name}"] = dataclasses.replace(common, gamma=gamma)
        configs += [
            dataclasses.replace(config, seed=seed, run_dir=root / f"{kind}-seed{seed}")
            for kind, config in kinds.items()
        ]
    return Plan(root, tuple(configs), resolved)


def _root(resolved: Config) -> Path:
    folder = resolved.dataset == "folder"
    dataset = resolved.data_dir.resolve().name if folder else resolved.dataset
    width = "" if resolved.width is None else f"-w{resolved.width}"
    return Path("runs") / f"sweep-{dataset}-{resolved.model.replace(':', '-')}{width}"


def arguments(config: Config) -> list[str]:
    """Return the arguments of train.py that give `config`."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        words.append("--float" if field.name == "float_baseline" else _option(field.name))
        if isinstance(value, tuple):
            words += value
        elif field.default is not False:  # a flag takes no value
            words.append(str(value))
    return words


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def run(sweep: Sweep, default_width: int | None, train: Path) -> int:
    """Train the missing runs of `sweep`, report on all finished ones, and return the exit code.

    Args:
        default_width: default width of the model; None if it cannot be chosen.
        train: path of train.py.

    Raises:
        UserError: something that the user can correct.
    """
    planned = plan(sweep, default_width)
    scripts = planned.scripts(train)
    if sweep.list_commands:
        print("\n".join(shlex.join([sys.executable, *words]) for words in scripts.values()))
        return 0
    for warning in planned.resolved.without_effect():
        print(f"warning: {warning}", file=sys.stderr)
    planned.done()  # raises for a wrong folder before anything is written to it
    with hold(planned.root, "sweep"):
        done = planned.done()
        for file in planned.root.iterdir():
            if is_left_over(file, _FILES):
                file.unlink()
        failed = _train(sweep, planned, scripts, done)
        results = read_all(planned.root, "*")
        if results:
            write_csv(results, planned.root / CSV)
            page = write_page(results, curves.write_figures(results, planned.root), planned.root)
            print(f"{planned.root / CSV}\n{page}")
    if failed:
        print(
            f"error: {len(failed)} of {len(scripts)} runs failed ({', '.join(failed)}); "
            f"what they printed is in {planned.root / LOGS}, the same command tries them again",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _train(
    sweep: Sweep, planned: Plan, scripts: dict[str, list[str]], done: list[Result]
) -> list[str]:
    """Run the scripts of runs that are not `done` and return the names of runs without a result."""
    assert planned.resolved.epochs
    finished = {result.name for result in done}
    missing = {name: words for name, words in scripts.items() if name not in finished}
    print(
        f"{len(scripts)} runs in {planned.root}, {len(finished)} of them done"
        + (f"; {min(sweep.jobs, len(missing))} at a time on {cores()} cores" if missing else "")
    )
    logs = planned.root / LOGS
    logs.mkdir(exist_ok=True)
    failed = []
    with (
        Progress(planned.folders, planned.resolved.epochs, done) as progress,
        closing(run_all(missing, sweep.jobs, logs, _gpus(sweep))) as pool,
    ):
        for running, ended in pool:
            for end in ended:
                folder = planned.folders[end.name]
                result = read(folder)
                if result is not None:
                    progress.finished(result)
                    continue
                gone = [] if folder.exists() else [f"{folder} was removed while it trained"]
                failed.append(end.name)
                progress.failure(end.name, end.lines + gone)
            progress.show(running)
    lost = [name for name, folder in planned.folders.items() if read(folder) is None]
    for name in lost:
        if name not in failed:
            progress.failure(name, [f"{planned.folders[name]} was removed after it had finished"])
    return lost


def _gpus(sweep: Sweep) -> list[str]:
    """Return the GPUs that runs take turns on, as CUDA_VISIBLE_DEVICES names them."""
    if sweep.device == "cpu" or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
