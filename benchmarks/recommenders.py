"""Quality of recommenders on a local dataset: each is trained by the real command, with several seeds.

    python benchmarks/recommenders.py --dataset ml-100k --seeds 0,1,2 --out benchmarks/results/recommenders.json \
        sasrec "encoder_decoder --quantizer_name rqvae" "decoder_only --quantizer_name rkmeans --dropout 0.3"
    python benchmarks/recommenders.py --table --out benchmarks/results/recommenders.json

Every argument is a model and its flags, in quotes. Each run is added to the file --out when it finishes. Runs
that are already in the file are skipped. Use `--trial` for tuning: it writes only the validation metrics.
"""

import argparse
import fcntl
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.quantization import machine  # noqa: E402 (needs the path above)
from common.cli import ROOT  # noqa: E402
from common.publishing import write_text  # noqa: E402
from common.tables import markdown  # noqa: E402

METRICS = [f"{metric}@{k}" for k in (1, 5, 10, 20) for metric in ("recall", "ndcg", "mrr")] + ["coverage@10"]
SHOWN = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
KEY = ("dataset", "model", "flags", "seed", "trial")  # the entries that identify a run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recommenders", nargs="*", metavar="MODEL", help="a model and its flags, in quotes")
    parser.add_argument("--dataset", default="Industrial_and_Scientific")
    parser.add_argument("--data_root", type=Path, default=ROOT / "data")
    parser.add_argument("--run_root", type=Path, default=None, help="folder to keep the runs in (default: delete them)")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--trial", action="store_true", help="write only the validation metrics")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to add the runs to")
    parser.add_argument("--table", action="store_true", help="print the runs in the file, without trials, as Markdown")
    args = parser.parse_args()
    for seed in args.seeds.split(","):
        for words in args.recommenders:
            model, _, flags = words.partition(" ")
            key = {"dataset": args.dataset, "model": model, "flags": flags, "seed": int(seed), "trial": args.trial}
            if key in [identity(run) for run in read(args.out)]:
                print(f"{words}, seed {seed}: skipped, already in {args.out}", flush=True)
                continue
            run = measure(key, args.data_root, args.run_root)
            add(args.out, run)
            metrics = run["valid"] if args.trial else run["test"]
            print(f"{words}, seed {seed}: " + ", ".join(f"{name} {metrics[name]:.4f}" for name in SHOWN), flush=True)
    if args.table:
        print(table(read(args.out)))


def measure(key: dict, data_root: Path, run_root: Path | None) -> dict:
    """Run the real command and return its results."""
    made_with = machine(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())), "cpu", [])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "recommendation/main.py"), "--model", key["model"], "--category",
                   key["dataset"], "--data_root", str(data_root), "--run_root", str(run_root or folder),
                   "--seed", str(key["seed"]), *shlex.split(key["flags"])]
        begun = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        seconds = time.monotonic() - begun
        run = Path(re.search(r"recommendation: wrote (.+)", done.stdout)[1])
        result = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        by_epoch = curve(run / "metrics.jsonl")
    measured = {split: of_split[result["protocol"]] for split, of_split in
                result.get("both", result["alone"]).items()}
    splits = ("valid",) if key["trial"] else ("valid", "test")
    return {**key, **made_with, "seconds": round(seconds),
            "num_parameters": result["num_parameters"], "best_epoch": result["best_epoch"],
            "protocol": result["protocol"],
            **{split: {name: round(measured[split][name], 4) for name in METRICS if name in measured[split]}
               for split in splits}, **({"curve": by_epoch} if by_epoch else {})}


def curve(path: Path) -> dict[str, dict[int, float]]:
    """Return the validation metrics by epoch, `ndcg@10 -> epoch -> value`; empty for a model without epochs."""
    epochs = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else []
    measured = [(line["epoch"], line["metrics"]) for line in epochs if "metrics" in line]
    return {name: {epoch: round(metrics[name], 4) for epoch, metrics in measured}
            for name in ("ndcg@10", "recall@10") if measured}


def identity(run: dict) -> dict:
    return {name: run.get(name) for name in KEY}


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def add(path: Path, run: dict) -> None:
    """Add a run to the file; several processes may do this at the same time."""
    with open(path.with_name(f".{path.name}.lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs = sorted([*read(path), run], key=lambda run: [str(run[name]) for name in KEY])
        lines = ",\n".join(map(json.dumps, runs))  # one run per line, so that a diff shows the new runs
        write_text(path, f'{{"what": "recommenders", "runs": [\n{lines}\n]}}\n')


def table(runs: list[dict]) -> str:
    """Return a Markdown table of all runs except trials.

    A row has the mean and the sample standard deviation over the seeds of one commit.
    """
    rows: dict[tuple, list[dict]] = {}
    for run in runs:
        if not run["trial"]:
            rows.setdefault((run["dataset"], run["model"], run["flags"], run["commit"]), []).append(run)
    return markdown(("dataset", "model", "flags", "commit", "seeds", *SHOWN), [
        [*row, ", ".join(str(run["seed"]) for run in of_row), *(shown([run["test"][name] for run in of_row])
                                                               for name in SHOWN)] for row, of_row in rows.items()])


def shown(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
