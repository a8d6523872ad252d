"""Speed and quality of quantizers: ours, cornac's TIGER, vector-quantize-pytorch, faiss and scikit-learn.

    python benchmarks/quantization.py epochs       # RQ-VAE: epochs per second, in turns, medians
    python benchmarks/quantization.py collisions   # collision rate over time: cornac's RQVAE for 60 s, ours for 30 s
    python benchmarks/quantization.py kmeans       # residual k-means: seconds and inertia
    python benchmarks/quantization.py large        # the real commands with a million items, in at most 8 GB

`pip install -r benchmarks/requirements.txt` installs the other libraries. All programs use the same number of threads,
data, sizes and seeds.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # otherwise `import quantization` would import this file

PEERS = {"epochs": ["cornac", "vector-quantize-pytorch"], "collisions": ["cornac"],
         "kmeans": ["cornac", "faiss-cpu", "scikit-learn"], "large": ["duckdb"]}
HIDDEN, LATENT, NUM_LEVELS, CODEBOOK_SIZE, COMMITMENT = (512, 256, 128), 32, 3, 256, 0.25
CHECK_SECONDS = 2.0  # seconds of training between two measurements of the collision rate
WITHIN = 1.01        # an inertia of at most this factor times the inertia of faiss counts as equal
LIMIT_GB = 8.0
EVENTS = 20          # events per item in `large`
BLOCK = 10_000       # rows that are generated at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=PEERS)
    parser.add_argument("--items", type=int, default=None, help="generated items (default: 12,000; large: 1,000,000)")
    parser.add_argument("--width", type=int, default=384, help="width of the generated embeddings")
    parser.add_argument("--embeddings", type=Path, default=None, help="float32 .npy file with the embeddings")
    parser.add_argument("--threads", type=int, default=2, help="number of threads of each program")
    parser.add_argument("--device", default="cpu", help="for epochs and collisions: cpu or cuda")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated seeds; each program runs once per seed")
    parser.add_argument("--epochs", type=int, default=15, help="for epochs: epochs of a run; the first is not measured")
    parser.add_argument("--batch_size", type=int, default=2048, help="for epochs: batch size of all programs")
    parser.add_argument("--peer_batch_size", type=int, default=1024,
                        help="for collisions: batch size of cornac; 1024 is its own default")
    parser.add_argument("--seconds", type=float, default=60.0,
                        help="for collisions: training time of cornac; ours has half of it")
    parser.add_argument("--iterations", type=int, default=10, help="for kmeans: number of iterations")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write the results to")
    args = parser.parse_args()
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    equal_threads(args.threads)
    metrics = {"what": args.what, **machine(args.threads, args.device, PEERS[args.what])}
    print(json.dumps(metrics), flush=True)
    metrics |= {"epochs": epochs, "collisions": collisions, "kmeans": kmeans, "large": large}[args.what](args)
    print(json.dumps(metrics, indent=2))
    if args.out:
        args.out.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    if args.what == "large" and max(metrics["peak_gb"].values()) > LIMIT_GB:
        raise SystemExit(f"error: peak memory above {LIMIT_GB:g} GB: {metrics['peak_gb']}")


def equal_threads(threads: int) -> None:
    """Set the number of threads of all libraries that are imported later, and of child processes."""
    if {"numpy", "torch"} & set(sys.modules):
        raise SystemExit("error: numpy or torch is already imported. Fix: run this file as a program")
    for name in [name for name in os.environ if name.startswith("OPENBLAS_")]:
        del os.environ[name]
    os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def machine(threads: int, device: str, peers: list[str]) -> dict:
    """Return the commit, the machine and the versions of the libraries. Exits if a library is missing."""
    commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True,
                            check=False).stdout.strip()
    versions = {}
    for name in ["torch", "numpy", *peers]:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise SystemExit(f"error: {name} not installed. Fix: pip install -r benchmarks/requirements.txt") from None
    return {"commit": commit, "cores": len(os.sched_getaffinity(0)), "threads": threads, "device": device,
            "python": platform.python_version(), **versions}


def generated(num_items: int, width: int) -> Iterator:
    """Yield blocks of unit vectors (n, width) that resemble the text embeddings of a shop.

    They form clusters and groups of clusters, and a few directions have most of the variance.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(width, min(64, width))))[0].T
    strength = (np.arange(len(directions)) + 1.0) ** -0.5
    groups, kinds = (rng.normal(size=(count, len(directions))) for count in (100, max(num_items // 8, 1)))
    kinds += groups[rng.integers(len(groups), size=len(kinds))]
    common = rng.normal(size=width) / width ** 0.5
    for start in range(0, num_items, BLOCK):
        count = min(BLOCK, num_items - start)
        latent = kinds[rng.integers(len(kinds), size=count)] + 0.5 * rng.normal(size=(count, len(directions)))
        rows = (latent * strength) @ directions + common + 0.02 * rng.normal(size=(count, width))
        yield (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def load(args: argparse.Namespace):
    """Return the embeddings, float32 (N, D), and set the number of threads of torch."""
    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    if args.embeddings:
        return np.ascontiguousarray(np.load(args.embeddings, allow_pickle=False), dtype=np.float32)
    return np.concatenate(list(generated(args.items or 12_000, args.width)))


class StopTraining(Exception):
    """Raised in a callback to stop a training loop."""


def now(device: str) -> float:
    """Return the time in seconds, after all work on the device has finished."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Measures the collision rate about every two seconds of training; the measurement is not part of the time."""

    def __init__(self, seconds: float, get_codes: Callable):
        self.seconds, self.get_codes, self.next, self.curve = seconds, get_codes, CHECK_SECONDS, []
        self.begun = time.perf_counter()

    def __call__(self, model) -> None:
        now = time.perf_counter() - self.begun
        if now < min(self.next, self.seconds):
            return
        codes = self.get_codes(model)
        self.curve.append((round(now, 2), 1.0 - len(codes.unique(dim=0)) / len(codes)))
        self.next, self.begun = now + CHECK_SECONDS, time.perf_counter() - now
        if now >= self.seconds:
            raise StopTraining


def train_ours(xs, seed: int, device: str, watch: Callable, **keys: object) -> None:
    """Train our RQ-VAE with our trainer, and call `watch` after each epoch. `keys` override the defaults."""
    import torch

    from common.config import resolve
    from common.run import Run
    from quantization.dataset import Embeddings
    from quantization.evaluate import EvaluationData
    from quantization.models import CONFIGS, config_path
    from quantization.models.rqvae import RQVAE
    from quantization.trainer import Trainer

    class Watched(RQVAE):
        def end_epoch(self, xs, generator):
            super().end_epoch(xs, generator)
            watch(self)

    overrides = {"seed": seed, "num_levels": NUM_LEVELS, "codebook_size": CODEBOOK_SIZE, **keys}
    config = resolve("rqvae", config_path("rqvae"), CONFIGS / "defaults.yaml",
                     [(key, str(value)) for key, value in overrides.items()])
    torch.manual_seed(seed)
    model = Watched(config.for_model(num_items=len(xs), inputs={"td": xs.shape[1]}, folder=None), xs.shape[1])
    embeddings = Embeddings(xs, {"td": xs.shape[1]}, {}, "")
    root, before = logging.getLogger(), list(logging.getLogger().handlers)
    root.setLevel(logging.DEBUG)  # as in the real command, which writes every epoch to run.log
    with tempfile.TemporaryDirectory(prefix="quantization-benchmark-") as scratch:
        run = Run(Path(scratch), config.values, {}, "python benchmarks/quantization.py")
        with run.open(force=False), contextlib.suppress(StopTraining):
            Trainer(model, embeddings, config, run, torch.device(device), EvaluationData(xs, None)).train()
        for handler in set(root.handlers) - set(before):
            root.removeHandler(handler)
            handler.close()


def train_cornac(xs, seed: int, device: str, watch: Callable, **params: object) -> None:
    """Train the RQVAE of cornac's TIGER. A replacement for its progress bar calls `watch` after each epoch."""
    import torch
    from cornac.models.tiger import TIGER, recom_tiger

    tiger = TIGER(rqvae_hidden_dims=HIDDEN, rqvae_latent_dim=LATENT, rqvae_num_levels=NUM_LEVELS, rqvae_beta=COMMITMENT,
                  rqvae_codebook_size=CODEBOOK_SIZE, device=device, seed=seed, **params)
    tiger.device_ = device  # usually set by `fit`, which would also train the recommender

    class Bar:
        def __init__(self, first: int, end: int, **_options):
            self.numbers = range(first, end)

        def __iter__(self):
            for number in self.numbers:
                yield number
                watch(tiger.rqvae)

        def set_postfix(self, **_values):
            pass

    torch.manual_seed(seed)
    with mock.patch.object(recom_tiger, "trange", Bar), contextlib.suppress(StopTraining):
        tiger._fit_rqvae(torch, torch.from_numpy(xs).to(device))


def train_vqp(xs, seed: int, device: str, watch: Callable, num_epochs: int, batch_size: int, options: dict) -> None:
    """Train an autoencoder with ResidualVQ in its usual settings.

    The codebooks are initialized by k-means on the first batch and updated by moving averages.
    """
    import torch
    from vector_quantize_pytorch import ResidualVQ

    from quantization.codebooks.layers import MLP

    torch.manual_seed(seed)
    encoder, decoder = MLP([xs.shape[1], *HIDDEN, LATENT]), MLP([LATENT, *HIDDEN[::-1], xs.shape[1]])
    quantizer = ResidualVQ(dim=LATENT, num_quantizers=NUM_LEVELS, codebook_size=CODEBOOK_SIZE, kmeans_init=True,
                           threshold_ema_dead_code=2, commitment_weight=COMMITMENT)
    model, rows = torch.nn.ModuleList([encoder, quantizer, decoder]).to(device), torch.from_numpy(xs).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    for _ in range(num_epochs):
        for picks in torch.randperm(len(rows), device=device).split(batch_size):
            batch = rows[picks]
            quantized, _, commitment = quantizer(encoder(batch))
            loss = torch.nn.functional.mse_loss(decoder(quantized), batch) + commitment.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        watch(model)


def epochs(args: argparse.Namespace) -> dict:
    """Measure the epochs per second of all three programs in turns, one run per seed.

    The first epoch, which includes the initialization by k-means, is not measured.
    """
    xs, count, size, options = load(args), args.epochs, args.batch_size, {"lr": 1e-3, "weight_decay": 1e-4}
    ours = {"hidden_sizes": list(HIDDEN), "latent_size": LATENT, "commitment_cost": COMMITMENT, "optimizer": "AdamW",
            "distance": "euclidean", "standardize": "false", "epochs": count, "eval_every": count + 1,
            "batch_size": size, **options}
    cornac = {"rqvae_n_epochs": count, "rqvae_batch_size": size, "rqvae_learning_rate": options["lr"],
              "rqvae_weight_decay": options["weight_decay"]}
    contenders = {"ours": lambda *run: train_ours(*run, **ours), "cornac": lambda *run: train_cornac(*run, **cornac),
                  "vector-quantize-pytorch": lambda *run: train_vqp(*run, count, size, options)}
    seconds = {name: [] for name in contenders}
    for seed in args.seeds:
        for name, train in contenders.items():
            ends = []
            train(xs, seed, args.device, lambda _model, ends=ends: ends.append(now(args.device)))
            seconds[name].append([end - begin for begin, end in zip(ends[:-1], ends[1:], strict=True)])
    rates = {name: 1 / statistics.median(sum(runs, [])) for name, runs in seconds.items()}
    return {"items": len(xs), "width": xs.shape[1], "batch_size": size, "epochs_per_second": rounded(rates),
            "times_as_fast_as": rounded({name: rates["ours"] / rate for name, rate in rates.items() if name != "ours"}),
            "rates_of_runs": {name: [round(1 / statistics.median(run), 3) for run in runs]
                              for name, runs in seconds.items()}}


def collisions(args: argparse.Namespace) -> dict:
    """Measure the collision rate over the training time.

    The time includes the initialization and the evaluations of our trainer, but not the measurement of the rate.
    """
    xs = load(args)
    import torch

    from quantization.utils import checked_codes

    rows = torch.from_numpy(xs).to(args.device)

    @torch.no_grad()
    def codes_of_ours(model):
        return torch.cat([checked_codes(model.eval(), batch) for batch in rows.split(8192)])

    def codes_of_cornac(model):
        return torch.cat([model.eval().encode(batch) for batch in rows.split(args.peer_batch_size)])

    def curve(train: Callable, seed: int, seconds: float, get_codes: Callable, **params: int) -> list:
        train(xs[:512], seed, args.device, Clock(0.0, get_codes), **params)  # warm-up
        clock = Clock(seconds, get_codes)
        train(xs, seed, args.device, clock, **params)
        return clock.curve

    runs, whole, half = [], args.seconds, args.seconds / 2
    for seed in args.seeds:
        theirs = curve(train_cornac, seed, whole, codes_of_cornac, rqvae_n_epochs=10 ** 6,
                       rqvae_batch_size=args.peer_batch_size)
        ours = curve(train_ours, seed, half, codes_of_ours, epochs=10 ** 6)
        reached = next((at for at, rate in ours if rate <= theirs[-1][1]), None)
        runs.append({"seed": seed, "cornac": theirs[-1][1], "ours": ours[-1][1], "ours_at_cornacs_after": reached,
                     "curves": {"cornac": theirs, "ours": ours}})
    return {"items": len(xs), "width": xs.shape[1], "seconds": {"cornac": whole, "ours": half},
            "batch_size_of_cornac": args.peer_batch_size,
            "mean": {name: statistics.mean(run[name] for run in runs) for name in ("cornac", "ours")}, "runs": runs}


def kmeans(args: argparse.Namespace) -> dict:
    """Measure seconds and inertia of residual k-means, in turns.

    Then measure ours with the smallest number of iterations that reaches the inertia of faiss.
    """
    xs, given = load(args), args.iterations
    methods = clusterings(args.threads)
    in_turns(xs[:10 * CODEBOOK_SIZE], methods, [0], dict.fromkeys(methods, 1))  # warm-up
    seconds, inertia = in_turns(xs, methods, args.seeds, dict.fromkeys(methods, given))
    equal, ours = 0, math.inf  # the smallest sufficient number of iterations
    while ours > WITHIN * inertia["faiss"] and equal < 10 * given:
        equal += 1
        ours = in_turns(xs, {"ours": methods["ours"]}, args.seeds, {"ours": equal})[1]["ours"]
    both = {name: methods[name] for name in ("ours", "faiss")}
    equal_seconds, equal_inertia = in_turns(xs, both, args.seeds, {"ours": equal, "faiss": given})
    return {"items": len(xs), "width": xs.shape[1], "iterations": given, "median_seconds": rounded(seconds),
            "inertia": rounded(inertia), "at_equal_inertia": {
                "iterations_of_ours": equal, "median_seconds": rounded(equal_seconds),
                "inertia_over_faiss": round(equal_inertia["ours"] / equal_inertia["faiss"], 4),
                "times_as_fast_as_faiss": round(equal_seconds["faiss"] / equal_seconds["ours"], 3)}}


def in_turns(xs, methods: dict, seeds: list[int], iterations: dict[str, int]) -> tuple[dict, dict]:
    """For each method, return the median seconds, and the mean inertia after the last level; one run per seed."""
    seconds, inertia = {name: [] for name in methods}, {name: [] for name in methods}
    for seed in seeds:
        for name, cluster in methods.items():
            begun, left = time.perf_counter(), xs
            for _ in range(NUM_LEVELS):
                centroids, codes = cluster(left, seed, iterations[name])
                left = left - centroids[codes]
            seconds[name].append(time.perf_counter() - begun)
            inertia[name].append(float((left ** 2).sum(dtype="float64")))
    return ({name: statistics.median(values) for name, values in seconds.items()},
            {name: statistics.mean(values) for name, values in inertia.items()})


def clusterings(threads: int) -> dict[str, Callable]:
    """Return name -> k-means function.

    Each function has the signature `(rows (N, D), seed, iterations) -> (centroids (K, D), codes (N,))`.
    """
    import faiss
    import torch
    from cornac.models.tiger.tiger import _kmeans
    from sklearn.cluster import KMeans

    from quantization.codebooks import kmeans as our_kmeans

    faiss.omp_set_num_threads(threads)

    def ours(left, seed, iterations):
        rows = torch.from_numpy(left)
        found = our_kmeans.kmeans(rows, CODEBOOK_SIZE, iterations, torch.Generator().manual_seed(seed))
        return found.centroids.numpy(), found.assign(rows).numpy()

    def by_faiss(left, seed, iterations):
        found = faiss.Kmeans(left.shape[1], CODEBOOK_SIZE, niter=iterations, nredo=1, seed=seed,
                             min_points_per_centroid=1, max_points_per_centroid=len(left))  # use all points
        found.train(left)
        return found.centroids, found.assign(left)[1]

    def by_cornac(left, seed, iterations):
        torch.manual_seed(seed)
        centroids = _kmeans(torch.from_numpy(left), CODEBOOK_SIZE, iterations)
        return centroids.numpy(), torch.cdist(torch.from_numpy(left), centroids).argmin(dim=1).numpy()

    def by_sklearn(left, seed, iterations):
        found = KMeans(CODEBOOK_SIZE, n_init=1, max_iter=iterations, tol=0.0, random_state=seed).fit(left)
        return found.cluster_centers_, found.labels_

    return {"ours": ours, "faiss": by_faiss, "cornac": by_cornac, "scikit-learn": by_sklearn}


def large(args: argparse.Namespace) -> dict:
    """Measure seconds and peak memory of the real commands.

    This process must stay small, because the peak memory of a child process includes the size of its parent.
    """
    from benchmarks.data import measured
    from common.artifacts import DatasetFolder

    num_items, runs = args.items or 1_000_000, {}
    with tempfile.TemporaryDirectory(prefix="quantization-benchmark-") as scratch:
        folder = DatasetFolder(Path(scratch) / "data", "Large")
        write_dataset(folder, num_items, args.width)
        for name, more in {"rkmeans": [], "rqvae": ["--epochs", "1"]}.items():
            runs[name] = measured([sys.executable, str(ROOT / "quantization" / "main.py"), "--quantizer_name", name,
                                   "--dataset", folder.name, "--data_root", str(folder.data_root), "--device", "cpu",
                                   "--run_root", str(Path(scratch) / "runs"), *more])
    by_key = {key: {name: run[key] for name, run in runs.items()} for key in ("peak_gb", "seconds")}
    return {"items": num_items, "width": args.width, "events": num_items * EVENTS, **by_key}


def write_dataset(folder, num_items: int, width: int) -> None:
    """Write items, interactions and `td` embeddings with their meta files, as the data stage does."""
    import duckdb
    import numpy as np

    from common.publishing import publish

    def write_vectors(path: Path) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (num_items, width)}
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for block in generated(num_items, width):
                file.write(block.data)

    def table(columns: str, count: int) -> Callable[[Path], None]:
        rows = f"SELECT {columns} FROM range({count}) r(i)"
        return lambda path: duckdb.execute(f"COPY ({rows}) TO '{path}' (FORMAT parquet)")

    same = {"items_sha256": "generated", "num_items": num_items}
    columns = "i AS item, 'B' || i AS raw_id, 'no. ' || i AS title, 'no. ' || i AS text"
    items = publish(folder.items, table(columns, num_items), {"inputs": {}, **same})
    made_from = {"inputs": {folder.items.name: items["sha256"]}, **same}
    columns = (f'i // 10 AS "user", (hash(i) % {num_items})::BIGINT AS item, i AS "timestamp", 5.0::FLOAT AS rating, '
               "CASE i % 10 WHEN 9 THEN 'test' WHEN 8 THEN 'valid' ELSE 'train' END AS split")
    publish(folder.interactions, table(columns, num_items * EVENTS), made_from)
    publish(folder.embeddings("td"), write_vectors, made_from)


def rounded(metrics: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in metrics.items()}


if __name__ == "__main__":
    main()
