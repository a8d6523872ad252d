"""Quality of quantizers on a local dataset: each is trained by the real command, with several seeds.

    python benchmarks/tokenizers.py --dataset Industrial_and_Scientific --out benchmarks/results/tokenizers.json \
        rqvae rkmeans "rqvae --sinkhorn_levels [-1]" random

Every argument is a quantizer and its flags, in quotes. The runs are deleted at the end.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.data import machine  # noqa: E402 (needs the path above)
from common.cli import ROOT  # noqa: E402

METRICS = ("collision_rate", "largest_bucket", "least_utilization", "explained_variance", "alike_1", "alike_2",
           "behavioral_coherence", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="+", metavar="QUANTIZER", help="a quantizer and its flags, in quotes")
    parser.add_argument("--dataset", default="Industrial_and_Scientific")
    parser.add_argument("--data_root", type=Path, default=ROOT / "data")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = {**machine(), "dataset": args.dataset, "seeds": args.seeds, "tokenizers": {}}
    for words in args.tokenizers:
        rows = [measure(words, args.dataset, args.data_root, seed) for seed in args.seeds.split(",")]
        report["tokenizers"][words] = {name: summary([row[name] for row in rows]) for name in METRICS}
        print(f"{words}: " + ", ".join(f"{name} {shown(value)}" for name, value in
                                       report["tokenizers"][words].items()), flush=True)
        if args.out:
            args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(words: str, dataset: str, data_root: Path, seed: str) -> dict:
    """Run the real command; return its metrics before disambiguation."""
    name, *flags = shlex.split(words)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "quantization/main.py"), "--quantizer_name", name, "--dataset", dataset,
                   "--data_root", str(data_root), "--run_root", folder, "--tag", "benchmark", "--seed", seed, *flags]
        begun = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.monotonic() - begun
        [path] = Path(folder).rglob("evaluation.json")
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    coherence = [*metrics.get("prefix_coherence", []), None, None]
    return {**metrics, "least_utilization": min(metrics["utilization"]),
            "alike_1": coherence[0], "alike_2": coherence[1],
            "explained_variance": metrics.get("explained_variance"), "seconds": seconds}


def summary(values: list[float | None]) -> dict | None:
    """Return the mean, the standard deviation and the values, or None if a value is None."""
    if None in values:
        return None
    return {"mean": statistics.mean(values), "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
            "values": values}


def shown(value: dict | None) -> str:
    return "-" if value is None else f"{value['mean']:.4g} ± {value['deviation']:.2g}"


if __name__ == "__main__":
    main()
