"""Run folders with made-up numbers; as a script, a stand-in for train.py that writes one."""

import json
import math
import sys
from pathlib import Path

LAYERS = {
    "prep.conv": 16, "layer1.conv": 32, "res1.block1.conv": 32, "res1.block2.conv": 32,
    "layer2.conv": 64, "layer3.conv": 128, "res3.block1.conv": 128, "res3.block2.conv": 128,
    "linear": 10,
}  # fmt: skip
EPOCHS = 4


def make_run(
    folder: Path, gamma: float | None, seed: int, dataset: str = "digits", accuracy: float = 0.0
) -> None:
    """Write the folder of a finished run: a higher γ makes it smaller and less accurate.

    A higher seed makes it slightly less accurate. `accuracy`, if not 0, replaces the made-up one.
    """
    percent = 100.0 if gamma is None else 8 / (1 + 300 * gamma) ** 0.8 + 0.01 * seed
    accuracy = accuracy or 0.98 - 0.05 / (1 + percent) - 0.002 * seed
    seconds = [2.0 - 0.1 * epoch for epoch in range(EPOCHS)]
    rows = [
        {
            "epoch": epoch,
            "val": {"accuracy": accuracy * (epoch + 1) / EPOCHS},
            "size": {
                "q_percent": 0.9 * percent ** (epoch / (EPOCHS - 1)),
                "stored_percent": percent ** (epoch / (EPOCHS - 1)),
                "stored_kb": percent,
                "weights_percent": math.sqrt(100 * percent),
            },
            "time": {"epoch_seconds": seconds[epoch], "eval_seconds": 0.1},
        }
        for epoch in range(EPOCHS)
    ]
    summary = {
        "dataset": dataset,
        "model": "resnet9",
        "gamma": gamma,
        "seed": seed,
        "epochs": EPOCHS,
        "test_accuracy": accuracy,
        "float_bits": 8_000_000,
        "q_bits": 70_000 * percent,
        "stored_bits": 80_000 * percent,
        "stored_percent": percent,
        "file_bytes": round(10_000 * percent),
        "file_percent": percent,
        "parameters_end": 100,
        "macs_end": 1000,
        "seconds_per_epoch": seconds,
        "seconds_total": 8.0,
        "channels_start": LAYERS,
        "channels_end": {name: round(width * percent / 100) for name, width in LAYERS.items()},
        "config": {"width": 16, "gamma": gamma, "seed": seed},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.scnn").write_bytes(b"\0" * round(10_000 * percent))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(summary))


def make_sweep(root: Path, gammas: list[float], seeds: int = 2, dataset: str = "digits") -> None:
    """Write the runs of a finished sweep, including its float baselines."""
    for seed in range(seeds):
        make_run(root / f"float-seed{seed}", None, seed, dataset)
        for gamma in gammas:
            make_run(root / f"gamma{gamma:g}-seed{seed}", gamma, seed, dataset)


if __name__ == "__main__":  # python sweep_runs.py --gamma G --seed S --run-dir DIR, as train.py
    arguments = dict(zip(sys.argv, sys.argv[1:], strict=False))
    folder = Path(arguments["--run-dir"])
    float_baseline = "--float" in sys.argv
    print(f"training {folder.name}")
    orders = folder.parent.parent / "orders.py"  # code that a test may write, to run first
    if orders.exists():
        exec(orders.read_text())
    gamma = None if float_baseline else float(arguments.get("--gamma", 0.01))
    make_run(folder, gamma, int(arguments.get("--seed", 0)))
