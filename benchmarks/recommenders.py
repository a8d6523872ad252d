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
import math
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.quantization import machine  # noqa: E402 (needs the path above)
from common.cli import ROOT  # noqa: E402
from common.command import run_command  # noqa: E402
from common.errors import ArtifactError, ConfigError, TrainingError, nearest  # noqa: E402
from common.publishing import write_text  # noqa: E402
from common.reading import shortened  # noqa: E402
from common.tables import markdown  # noqa: E402
from recommendation.metrics import PROTOCOLS, RANKERS  # noqa: E402
from recommendation.models import names  # noqa: E402
from recommendation.options import parse_seeds  # noqa: E402

METRICS = [f"{metric}@{k}" for k in (5, 10, 20) for metric in ("recall", "ndcg")] + ["coverage@10"]
SHOWN = ("recall@10", "ndcg@10")
KEY = ("dataset", "model", "flags", "seed", "trial")  # the entries that identify a run


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recommenders", nargs="*", metavar="MODEL", help="a model and its flags, in quotes")
    parser.add_argument("--dataset", default="Industrial_and_Scientific")
    parser.add_argument("--data_root", type=Path, default=ROOT / "data")
    parser.add_argument("--run_root", type=Path, default=None, help="folder to keep the runs in (default: delete them)")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--trial", action="store_true", help="write only the validation metrics")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to add the runs to")
    parser.add_argument("--table", action="store_true", help="print the runs in the file as Markdown")
    args = parser.parse_args(argv)
    for words in args.recommenders:
        require_one_model(words)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in parse_seeds(args.seeds):
        for words in args.recommenders:
            model, _, flags = words.partition(" ")
            key = {"dataset": args.dataset, "model": model, "flags": flags, "seed": seed, "trial": args.trial}
            if key in [identity(run) for run in read(args.out)]:
                print(f"{words}, seed {seed}: skipped, already in {args.out}", flush=True)
                continue
            run = with_first_times(measure(key, args.data_root, args.run_root), read(args.out))
            add(args.out, run)
            for ranker, of_ranker in run["results"].items():
                for split, of_split in of_ranker.items():
                    print(f"{words}, seed {seed}, {ranker}, {split}: " + "; ".join(
                        f"{protocol} items: " + ", ".join(f"{name} {metrics[name]:.4f}" for name in SHOWN)
                        for protocol, metrics in of_split.items()), flush=True)
    if args.table:
        print("\n\n".join([tables(read(args.out)), trial_tables(read(args.out))]))


def require_one_model(words: str) -> None:
    """Raise ConfigError if an argument is not a model and its flags."""
    model, _, flags = words.partition(" ")
    try:
        shlex.split(flags)
    except ValueError as error:
        raise ConfigError("MODEL", f"{words!r} cannot be split into words", str(error), "close the quotes") from error
    if model not in names():
        raise ConfigError("MODEL", f"{words!r} does not begin with the name of one model", nearest(model, names()),
                          f"write one model and its flags in quotes; models: {', '.join(names())}")


def measure(key: dict, data_root: Path, run_root: Path | None) -> dict:
    """Run the real command and return its results."""
    made_with = machine(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())), "cpu", [])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "recommendation/main.py"), "--model", key["model"], "--category",
                   key["dataset"], "--data_root", str(data_root), "--run_root", str(run_root or folder),
                   "--seed", str(key["seed"]), *shlex.split(key["flags"])]
        begun, used = time.monotonic(), cpu_seconds()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TrainingError(shlex.join(command), "failed", done.stderr[-2000:], "correct the flags")
        seconds, used = time.monotonic() - begun, cpu_seconds() - used
        run = Path(re.search(r"recommendation: wrote (.+)", done.stdout)[1])
        result = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        ranks = json.loads((run / "ranks.json").read_text(encoding="utf-8"))
        params = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))[key["model"]]["training_params"]
        by_epoch = curve(run / "metrics.jsonl")
    rankers, splits = [name for name in RANKERS if name in result], ("valid",) if key["trial"] else ("valid", "test")
    return {**key, **made_with, "run": run.name, "prior": params["prior"],
            "seconds": round(seconds), "cpu_seconds": round(used),
            **{name: result[name] for name in ("num_parameters", "best_epoch", "num_trials", "protocol", "weights")
               if name in result},
            "results": {ranker: {split: {protocol: {name: round(metrics[name], 4) for name in METRICS}
                                         for protocol, metrics in result[ranker][split].items()}
                                 for split in splits} for ranker in rankers},
            **({} if key["trial"] or "prior" not in rankers else {"to_prior": {
                ranker: {protocol: paired(ranks[ranker][protocol], ranks["prior"][protocol])
                         for protocol in ranks[ranker]} for ranker in rankers if ranker != "prior"}}),
            **({"curve": by_epoch} if by_epoch else {})}


def with_first_times(run: dict, others: list[dict]) -> dict:
    """Return a run with the times of an earlier trial of the same run, whose results the command only reused."""
    first = next((other for other in others if other["run"] == run["run"]), run)
    return {**run, **{name: first[name] for name in ("seconds", "cpu_seconds")}}


def cpu_seconds() -> float:
    """Return the CPU time of all finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def paired(ranks: list[int], others: list[int]) -> list[float]:
    """Return the mean difference of ndcg@10 between two lists of ranks, and its standard error over the targets."""
    def gain(rank: int) -> float:
        return 1 / math.log2(1 + rank) if 0 < rank <= 10 else 0.0

    differences = [gain(rank) - gain(other) for rank, other in zip(ranks, others, strict=True)]
    return [round(statistics.mean(differences), 5),
            round(statistics.pstdev(differences) / math.sqrt(len(differences)), 5)]


def curve(path: Path) -> dict[str, dict[int, float]]:
    """Return the validation metrics by epoch, `ndcg@10 -> epoch -> value`; empty for a model without epochs."""
    epochs = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else []
    measured = [(line["epoch"], line["metrics"]) for line in epochs if "metrics" in line]
    return {name: {epoch: round(metrics[name], 4) for epoch, metrics in measured}
            for name in ("ndcg@10", "recall@10") if measured}


def identity(run: dict) -> dict:
    return {name: run.get(name) for name in KEY}


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(path, "is not a file of runs", shortened(str(error)), "use another --out") from error


def add(path: Path, run: dict) -> None:
    """Add a run to the file; several processes may do this at the same time."""
    with open(path.with_name(f".{path.name}.lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs = sorted([*read(path), run], key=lambda run: [str(run[name]) for name in KEY])
        lines = ",\n".join(map(json.dumps, runs))  # one run per line, so that a diff shows the new runs
        write_text(path, f'{{"what": "recommenders", "runs": [\n{lines}\n]}}\n')


def tables(runs: list[dict]) -> str:
    """Return a Markdown table of all runs except trials, for each dataset.

    A row has the mean and the sample standard deviation over the seeds of one commit. `to prior` is the difference of
    the test ndcg@10 for unseen items to the prior alone, paired over the users. Its standard error is the mean over the
    seeds, which is not less than the standard error of the mean.
    """
    rows: dict[tuple, list[dict]] = {}
    for run in runs:
        if not run["trial"]:
            rows.setdefault((run["dataset"], run["model"], run["flags"], run["commit"]), []).append(run)
    heads = ("model", "flags", "commit", "seeds", "trials", "parameters", "CPU minutes", "validation ndcg@10",
             *(f"{name} ({protocol})" for protocol in PROTOCOLS for name in SHOWN), "to prior")
    parts = []
    for dataset in dict.fromkeys(key[0] for key in rows):
        lines = [line for key, of_row in rows.items() if key[0] == dataset
                 for line in lines_of(key, of_row, trials_of(runs, of_row))]
        parts.append(f"{dataset}:\n\n{markdown(heads, lines)}")
    return "\n\n".join(parts)


def trial_tables(runs: list[dict]) -> str:
    """Return a Markdown table of the trials of each dataset, the best validation of a model first.

    The metrics are those of the protocol that selects the checkpoint.
    """
    lines: dict[str, list[list[str]]] = {}
    for run in runs:
        if run["trial"]:
            metrics = [f"{run['results'][ranker]['valid'][run['protocol']]['ndcg@10']:.4f}"
                       if ranker in run["results"] else "" for ranker in ("alone", "both")]
            lines.setdefault(run["dataset"], []).append(
                [run["model"], without_prior(run["flags"]), short(run["commit"]), *metrics])
    heads = ("model", "flags", "commit", "validation ndcg@10", "with the prior")
    return "\n\n".join(
        f"{dataset}, trials:\n\n{markdown(heads, sorted(of_dataset, key=lambda line: (line[0], -float(line[3]))))}"
        for dataset, of_dataset in lines.items())


def trials_of(runs: list[dict], of_row: list[dict]) -> int:
    """Return the number of settings that were tried for the model of a row, on its dataset."""
    own = {frozenset(re.findall(r"--\S+(?: (?!--)\S+)*", without_prior(run["flags"]))) for run in runs
           if (run["dataset"], run["model"]) == (of_row[0]["dataset"], of_row[0]["model"])}
    return max([len(own), *(run.get("num_trials", 0) for run in of_row)])


def short(commit: str | None) -> str:
    """Return the first digits of a commit, and whether the files were changed after it."""
    digits, sign, dirty = (commit or "").partition("-")
    return digits[:7] + sign + dirty


def without_prior(flags: str) -> str:
    return re.sub(r" *--prior \S+", "", flags).strip()


def lines_of(key: tuple, of_row: list[dict], num_trials: int) -> list[list[str]]:
    """Return the cells of a row for the model alone, and of one with its prior."""
    _, model, flags, commit = key
    lines = []
    for ranker in (name for name in RANKERS if name != "prior" and name in of_row[0]["results"]):
        results = [run["results"][ranker] for run in of_row]
        lines.append([model + (f" + {of_row[0]['prior']}" if ranker == "both" else ""),
                      without_prior(flags), short(commit),
                      ", ".join(str(run["seed"]) for run in of_row), str(num_trials),
                      f"{of_row[0]['num_parameters']:,}",
                      f"{statistics.mean(run['cpu_seconds'] for run in of_row) / 60:.1f}",
                      shown([result["valid"][run["protocol"]]["ndcg@10"] for result, run in zip(
                          results, of_row, strict=True)]),
                      *(shown([result["test"][protocol][name] for result in results])
                        for protocol in PROTOCOLS for name in SHOWN), to_prior(of_row, ranker)])
    return lines


def to_prior(runs: list[dict], ranker: str) -> str:
    if "to_prior" not in runs[0]:
        return ""
    means, errors = zip(*(run["to_prior"][ranker]["unseen"] for run in runs), strict=True)
    return f"{statistics.mean(means):+.4f} ± {statistics.mean(errors):.4f}"


def shown(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


if __name__ == "__main__":
    sys.exit(run_command(main))
