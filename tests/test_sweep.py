"""sweep.py as a user meets it: its plan, its pool of runs, refusals, kills, and finishing later."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro
from commands import Cli, assert_refused
from hypothesis import given
from hypothesis import strategies as st
from sweep_runs import make_run
from torchvision.datasets import CIFAR10

import sweep as script
from selfcompress.sweeping import curves
from selfcompress.sweeping import sweep as library
from selfcompress.sweeping.pool import Ended, run_all
from selfcompress.sweeping.progress import Progress
from selfcompress.sweeping.sweep import Sweep, arguments, plan
from selfcompress.training import runs
from selfcompress.training.config import Config
from selfcompress.training.lock import hold

ROOT = Path(__file__).parent.parent
STAND_IN = Path(__file__).with_name("sweep_runs.py")  # for train.py
GAMMAS = ["--gammas", "0.1", "0.01", "--seeds", "2", "--dataset", "digits"]
NAMES = [
    f"{kind}-seed{seed}" for seed in (0, 1) for kind in ("float", "gamma0.01", "gamma0.1")
]  # fmt: skip


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Return a function that runs sweep.py in this process, with the stand-in for train.py."""
    train = library.run

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["sweep.py", *map(str, args)])
        monkeypatch.setattr(script, "run", lambda sweep, width, _: train(sweep, width, STAND_IN))
        monkeypatch.setattr(curves, "write_figures", lambda *_: [])  # tested in test_curves.py
        code = script.main()
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_every_gamma_and_seed_is_a_run_and_the_baseline_too(cli: Cli, tmp_path: Path) -> None:
    root = tmp_path / "sweep"
    code, out, err = cli(*GAMMAS, "--jobs", 2, "--run-dir", root)
    assert (code, err) == (0, "")
    for name in NAMES:
        assert (root / name / runs.SUMMARY).exists()
        assert f"{name} done" in out
    assert "6 of 6 done" in out
    assert (root / "report.html").exists()
    assert len((root / "results.csv").read_text().splitlines()) == 7

    before = (root / NAMES[0] / runs.SUMMARY).stat().st_mtime_ns
    for name in (".results.csv.x1y2z3_4", ".curve.png.x1y2z3_4", ".notes.csv.x1y2z3_4"):
        (root / name).write_text("")
    code, out, _ = cli(*GAMMAS, "--jobs", 2, "--run-dir", root)
    assert code == 0
    # A process that is killed while it writes leaves the first two; the third is the user's.
    assert [file.name for file in root.glob(".*.*.*")] == [".notes.csv.x1y2z3_4"]
    assert "6 runs" in out and "6 of them done" in out
    assert "started" not in out
    assert (root / NAMES[0] / runs.SUMMARY).stat().st_mtime_ns == before

    # More seeds and more γ continue the sweep in the same folder.
    more = ["--gammas", "0.1", "0.3", "--seeds", "1", "--dataset", "digits"]
    code, out, _ = cli(*more, "--run-dir", root)
    assert code == 0
    assert out.count("started") == 1
    assert len((root / "results.csv").read_text().splitlines()) == 8


def test_the_plan_is_one_idempotent_command_per_run(cli: Cli, tmp_path: Path) -> None:
    options = ["--width", "8", "--bits", "2", "--flip", "True", "--exclude", "prep.conv", "linear"]
    code, out, err = cli(*GAMMAS, *options, "--run-dir", tmp_path / "a sweep", "--list")
    assert (code, err) == (0, "")
    assert not (tmp_path / "a sweep").exists()
    commands = [shlex.split(line) for line in out.splitlines()]
    assert [Path(command[-1]).name for command in commands] == NAMES
    for command, name in zip(commands, NAMES, strict=True):
        assert command[:2] == [sys.executable, str(STAND_IN)]
        config = tyro.cli(Config, args=command[2:], config=(tyro.conf.FlagCreatePairsOff,))
        assert config.float_baseline == name.startswith("float")
        assert f"seed{config.seed}" in name
        assert (config.dataset, config.width, config.flip) == ("digits", 8, True)
        if config.float_baseline:
            assert not config.without_effect()
        else:
            assert f"gamma{config.gamma:g}-" in name
            assert (config.bits, config.exclude) == (2, ("prep.conv", "linear"))


def test_a_sweep_falls_back_to_digits_as_a_run_does(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CIFAR10, "url", "https://invalid.invalid/cifar.tar.gz")
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("--gammas", "0.1", "--seeds", 1, "--list")
    assert code == 0
    assert "TRAINING ON DIGITS INSTEAD" in err
    assert out.count("--dataset digits") == 2
    assert out.count("runs/sweep-digits-resnet9-w64/") == 2
    assert_refused(cli("--gammas", "0.1", "--dataset", "cifar10"), "cifar10")


optional = st.none() | st.integers(1, 99)


@given(
    st.builds(
        Config,
        gamma=st.floats(0, allow_infinity=False),
        float_baseline=st.booleans(),
        model=st.sampled_from(["resnet9", "torchvision:resnet18"]),
        dataset=st.sampled_from([None, "digits", "folder"]),
        data_dir=st.sampled_from([Path("data"), Path("/my data/-x")]),
        image_size=optional,
        width=optional,
        epochs=optional,
        lr=st.floats(1e-9, 10),
        flip=st.sampled_from([None, True, False]),
        fractional_bits=st.booleans(),
        exclude=st.lists(st.sampled_from(["a", "b.c"])).map(tuple),
        seed=st.integers(-(2**31), 2**31 - 1),
        run_dir=st.none() | st.just(Path("runs/x")),
        overwrite=st.booleans(),
    )
)
def test_arguments_make_the_configuration_they_were_made_of(config: Config) -> None:
    made = tyro.cli(Config, args=arguments(config), config=(tyro.conf.FlagCreatePairsOff,))
    assert made == config


def test_every_gamma_has_a_run_of_its_own() -> None:
    sweep = Sweep(gammas=(0.12345671, 0.12345674, 100, 1e-5), seeds=1, dataset="digits")
    assert [folder for folder in plan(sweep, 64).folders if folder.startswith("gamma")] == [
        "gamma1e-05-seed0", "gamma0.12345671-seed0", "gamma0.12345674-seed0", "gamma100-seed0",
    ]  # fmt: skip


def test_a_range_is_log_spaced_and_its_numbers_are_short() -> None:
    sweep = Sweep(gamma_range=(0.001, 0.3), points=4, gammas=(0.1, 0.001), dataset="digits")
    assert list(sweep.all_gammas()) == ["0.001", "0.00669", "0.0448", "0.1", "0.3"]
    assert plan(sweep, 64).root == Path("runs/sweep-digits-resnet9-w64")


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ([], "--gammas"),
        (["--gammas"], "--gammas"),
        (["--gammas", "0.1", "-1"], "--gammas"),
        (["--gammas", "nan"], "--gammas"),
        (["--gammas", "1e305"], "--gammas"),
        (["--gamma-range", "0.1", "1e305"], "--gamma-range"),
        (["--gamma-range", "0", "0.1"], "--gamma-range"),
        (["--gamma-range", "0.1", "0.01"], "--gamma-range"),
        (["--gamma-range", "0.1", "1", "--points", "1"], "--points"),
        (["--gammas", "0.1", "--jobs", "0"], "--jobs"),
        (["--gammas", "0.1", "--seeds", "0"], "--seeds"),
        (["--gammas", "0.1", "--epochs", "0"], "--epochs"),
        (["--gammas", "0.1", "--model", "resnet10"], "resnet10"),
        (["--gammas", "0.1", "--dataset", "folder", "--data-dir", "missing"], "missing"),
    ],
)
def test_bad_input_is_one_line(args: list[str], part: str, cli: Cli, tmp_path: Path) -> None:
    assert_refused(cli("--dataset", "digits", "--run-dir", tmp_path / "s", *args), part)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("args", [["--gamma", "1"], ["--seed", "1"], ["--float"], ["--overwrite"]])
def test_options_that_a_sweep_chooses_itself_are_not_offered(
    args: list[str], cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli(*GAMMAS, *args)
    assert stop.value.code == 2
    assert args[0] in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli("--help")
    shown = capsys.readouterr().out
    assert f"{args[0]} " not in shown
    assert "--gammas" in shown and "--penalty-from" in shown


def test_a_folder_of_another_sweep_is_refused(cli: Cli, tmp_path: Path) -> None:
    root = tmp_path / "sweep"
    sweep = Sweep(gammas=(0.2,), dataset="digits", width=8)
    config = plan(sweep, 64).resolved.as_json() | {"gamma": 0.2}
    (root / "gamma0.2-seed0").mkdir(parents=True)
    (root / "gamma0.2-seed0" / runs.CONFIG).write_text(json.dumps(config))
    # That run need not be one of the plan.
    assert_refused(cli(*GAMMAS, "--run-dir", root), "width is 8 there and 64 here")
    assert cli(*GAMMAS, "--width", 8, "--run-dir", root)[0] == 0

    (root / "gamma0.2-seed0" / runs.CONFIG).write_text("{")
    assert_refused(cli(*GAMMAS, "--width", 8, "--run-dir", root), "damaged", "gamma0.2-seed0")


def test_a_folder_of_other_things_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    assert_refused(cli(*GAMMAS, "--run-dir", tmp_path), "holds files but no sweep")
    make_run(tmp_path / "run", 0.1, 0)
    (tmp_path / "run" / runs.CONFIG).write_text("{}")
    assert_refused(cli(*GAMMAS, "--run-dir", tmp_path / "run"), "holds files but no sweep")
    assert {file.name for file in tmp_path.iterdir()} == {"thesis.tex", "run"}


def test_two_sweeps_in_one_folder_are_refused(cli: Cli, tmp_path: Path) -> None:
    with hold(tmp_path / "sweep", "sweep"):
        result = cli(*GAMMAS, "--run-dir", tmp_path / "sweep")
        assert_refused(result, "another sweep is at work in", str(tmp_path / "sweep"))
    assert cli(*GAMMAS, "--run-dir", tmp_path / "sweep")[0] == 0


def test_failed_runs_are_told_with_their_last_lines_and_tried_again(
    cli: Cli, tmp_path: Path
) -> None:
    root = tmp_path / "sweep"
    orders = tmp_path / "orders.py"
    orders.write_text("if 'gamma0.01-' in str(folder): sys.exit('error: out of [paper]')")
    code, out, err = cli(*GAMMAS, "--jobs", 3, "--run-dir", root)
    assert code == 1
    assert "gamma0.01-seed0 FAILED\n    error: out of [paper]\n" in out
    assert "4 of 6 done, 2 failed" in out
    assert_refused((code, out, err), "2 of 6 runs failed (gamma0.01-seed0, gamma0.01-seed1)")
    assert len((root / "results.csv").read_text().splitlines()) == 5  # a header and 4 runs

    orders.write_text("sys.exit('error: something else')")
    code, out, _ = cli(*GAMMAS, "--run-dir", root)
    assert code == 1
    assert out.count("something else") == 2
    assert "4 of 6 done, 2 failed" in out  # also where the last to end is a failure
    assert "out of [paper]" not in out  # the error of the first attempt
    orders.unlink()
    code, out, _ = cli(*GAMMAS, "--run-dir", root)
    assert code == 0
    assert out.count("started") == 2


def test_killed_runs_are_told_by_their_signal(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "orders.py").write_text("import os; sys.stdout.flush(); os.kill(os.getpid(), 9)")
    code, out, err = cli(*GAMMAS, "--run-dir", tmp_path / "sweep")
    assert code == 1
    assert "float-seed0 FAILED\n    training float-seed0\n    ended by SIGKILL\n" in out
    assert_refused((code, out, err), "6 of 6 runs failed")


@pytest.mark.parametrize("when", ["training", "finished"])
def test_a_run_folder_removed_meanwhile_fails_that_run_alone(
    when: str, cli: Cli, tmp_path: Path
) -> None:
    root = tmp_path / "sweep"
    removal = {
        "training": "if 'float-seed1' in str(folder): sys.exit('error: it is gone')",
        "finished": "import shutil; shutil.rmtree(folder.parent / 'float-seed1', True)",
    }[when]
    make_run(root / "float-seed1", None, 1)
    (root / "logs").mkdir()
    (root / "gamma0.1-seed0").mkdir()
    config = plan(Sweep(gammas=(0.1,), dataset="digits"), 64).resolved.as_json()
    (root / "gamma0.1-seed0" / runs.CONFIG).write_text(json.dumps(config | {"gamma": 0.1}))
    if when == "training":
        (root / "float-seed1" / runs.SUMMARY).unlink()
        removal = "import shutil; shutil.rmtree(folder.parent / 'float-seed1', True)\n" + removal
    (tmp_path / "orders.py").write_text(removal)
    code, out, err = cli(*GAMMAS, "--run-dir", root)
    assert code == 1
    assert "float-seed1 was removed" in out
    assert_refused((code, out, err), "1 of 6 runs failed (float-seed1)")
    (tmp_path / "orders.py").unlink()
    assert cli(*GAMMAS, "--run-dir", root)[0] == 0


def write_scripts(folder: Path, count: int, code: str) -> dict[str, list[str]]:
    (folder / "script.py").write_text(code)
    return {f"script{i}": [str(folder / "script.py"), str(i)] for i in range(count)}


def test_the_pool_is_bounded_in_order_and_shares_cores_and_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfcompress.sweeping.pool.cores", lambda: 7)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MKL_NUM_THREADS", "5")
    show = "import os, time; print(*(os.environ.get(n) for n in "
    show += "('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'CUDA_VISIBLE_DEVICES'))); time.sleep(0.3)"
    scripts = write_scripts(tmp_path, 7, show)
    ended: list[Ended] = []
    started: list[str] = []
    most = 0
    for running, over in run_all(scripts, 3, tmp_path, ["4", "GPU-x"]):
        started += sorted(running - set(started))
        most = max(most, len(running))
        ended += over
    assert most == 3
    assert started == sorted(scripts)
    assert sorted(end.name for end in ended) == sorted(scripts)
    # 7 cores for 3 jobs, and no more threads than the user asked for.
    assert {end.lines[0] for end in ended} == {"1 2 4", "1 2 GPU-x"}
    assert all(end.code == 0 for end in ended)
    monkeypatch.setenv("OMP_NUM_THREADS", "0")  # no number is asked for
    over = [end for _, more in run_all(scripts, 3, tmp_path) for end in more]
    assert {end.lines[-1] for end in over} == {"2 2 None"}


def alive(pid: int) -> bool:
    """Return whether the process runs (a zombie does not)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and "State:\tZ" in status.read_text())


def assert_ended(processes: list[int], seconds: float = 5) -> None:
    """Wait up to `seconds` for all `processes` to end, and fail if any still runs."""
    deadline = time.monotonic() + seconds
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, processes))


def pids(folder: Path, count: int, seconds: float = 30) -> list[int]:
    """Return the process ids that scripts wrote into `folder`, once there are `count`."""
    deadline = time.monotonic() + seconds
    while len(files := list(folder.glob("*.pid"))) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(files) == count
    return [int(file.stem) for file in files]


WAIT = "import os, time; open(f'{os.path.dirname(__file__)}/{os.getpid()}.pid', 'w'); "
WAIT += "time.sleep(600)"


def test_leaving_the_pool_ends_its_processes(tmp_path: Path) -> None:
    pool = run_all(write_scripts(tmp_path, 2, WAIT), 2, tmp_path)
    next(pool)
    running = pids(tmp_path, 2)
    assert all(map(alive, running))
    pool.close()
    assert not any(map(alive, running))


def test_ctrl_c_ends_what_runs_and_the_same_command_goes_on(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "sweep"
    wait = WAIT.replace("os.path.dirname(__file__)", "folder.parent.parent")
    (tmp_path / "orders.py").write_text(f"if float_baseline or 'seed1' in folder.name: {wait}")
    with monkeypatch.context() as patch:

        def interrupt(*_: object) -> None:
            if len(list(tmp_path.glob("*.pid"))) == 2:
                raise KeyboardInterrupt

        patch.setattr(Progress, "show", interrupt)
        code, out, err = cli(*GAMMAS, "--jobs", 2, "--run-dir", root)
    assert (code, err) == (130, "\nstopped; the same command finishes what is missing\n")
    assert not any(map(alive, pids(tmp_path, 2)))
    assert out.count(" done: ") == 2  # of seed 0
    (tmp_path / "orders.py").unlink()
    code, out, _ = cli(*GAMMAS, "--jobs", 2, "--run-dir", root)
    assert code == 0
    assert out.count("started") == 4


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    scripts = write_scripts(tmp_path, 2, WAIT)
    parent = (
        "import sys; from pathlib import Path; from selfcompress.sweeping.pool import run_all\n"
        f"for _ in run_all({scripts!r}, 2, Path({str(tmp_path)!r})): pass"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    running = pids(tmp_path, 2, seconds=60)
    assert all(map(alive, running))
    process.kill()
    process.wait()
    assert_ended(running)


def children(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, text=True)
    pairs = [line.split() for line in listed.stdout.splitlines()]
    return [int(pid) for pid, its_parent in pairs if int(its_parent) == parent]


OPTIONS = (
    "--gammas 0.03 0.3 --seeds 1 --jobs 2 --dataset digits --width 4 --image-size 8 --epochs 12 "
    "--batch-size 128 --device cpu --precision fp32"
).split()


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_is_finished_by_the_same_command(tmp_path: Path) -> None:
    command = [sys.executable, "sweep.py", *OPTIONS, "--run-dir"]

    def start(folder: Path) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*command, str(folder)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    first = start(killed)
    metrics = killed / "gamma0.03-seed0" / runs.METRICS
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    orphans = children(first.pid)
    assert orphans
    first.kill()
    first.wait()
    second = start(killed)  # without waiting
    assert_ended(orphans)
    # On a busy machine the run beside it may have ended already, or not have come as far.
    saved = {file.parent.name for file in killed.glob(f"*/{runs.CHECKPOINT}")}
    middle = saved - {file.parent.name for file in killed.glob(f"*/{runs.SUMMARY}")}
    assert metrics.parent.name in middle
    out, err = second.communicate(timeout=300)
    assert (second.returncode, err) == (0, ""), out
    logs = [file.read_text() for file in (killed / "logs").glob("*.log")]
    assert sum("going on after epoch" in log for log in logs) == len(middle)

    third = start(whole)
    out, err = third.communicate(timeout=300)
    assert (third.returncode, err) == (0, ""), out

    def outcome(root: Path) -> dict[str, tuple[float, int]]:
        found = {}
        for file in root.glob(f"*/{runs.SUMMARY}"):
            summary = json.loads(file.read_text())
            found[file.parent.name] = summary["test_accuracy"], summary["file_bytes"]
            assert (file.parent / runs.NETWORK).stat().st_size == summary["file_bytes"]
        return found

    assert outcome(killed) == outcome(whole)  # the kill left no trace
    assert len(outcome(whole)) == 3
