"""Speed and memory of the data stage, compared with the same steps in pandas.

    python benchmarks/data.py compare                 # the data stage and pandas in turns, medians
    python benchmarks/data.py large                   # 20 million events, 2 million users, 1 million items, 4 GB
    python benchmarks/data.py literals                # metadata as Python literals, the format of Amazon 2014
    python benchmarks/data.py csv                     # the same dataset as two CSV files
    python benchmarks/data.py cf                      # the collaborative embedding of the interactions
    python benchmarks/data.py embed --texts FILE      # the embedding of texts, compared with SentenceTransformer.encode
    python benchmarks/data.py generate --folder DIR   # write a generated dataset in the format of Amazon 2018

All commands except embed use a generated dataset. --events N changes its size. --smoke uses a very small one, to test
that everything works. pandas needs pyarrow to write Parquet (benchmarks/requirements.txt).
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb

ROOT = Path(__file__).resolve().parents[1]
NAME = "Industrial_and_Scientific"
SIZES = {"compare": (4_000_000, 400_000, 200_000), "large": (20_000_000, 2_000_000, 1_000_000)}
WORDS = ["steel", "brass", "valve", "pump", "gauge", "tape", "thread", "hose", "clamp", "filter", "sensor", "motor",
         "bearing", "gasket", "drill", "laser", "digital", "heavy", "duty", "precision", "industrial", "stainless",
         "adjustable", "universal", "compact", "portable", "wireless", "insulated"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("generate", "compare", "large", "literals", "csv", "cf", "embed",
                                         "pandas"))
    parser.add_argument("--folder", type=Path, default=None, help="folder of the generated files (default: temporary)")
    parser.add_argument("--events", type=int, default=None, help="number of generated events")
    parser.add_argument("--smoke", action="store_true", help="use 20,000 events and one round")
    parser.add_argument("--rounds", type=int, default=3, help="number of runs of each program; medians are reported")
    parser.add_argument("--texts", type=Path, default=None, help="for embed: a file with one text per line")
    parser.add_argument("--model", type=Path, default=None, help="for embed: folder of a sentence-transformers model")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write the results to")
    args = parser.parse_args()
    if args.smoke:
        args.events, args.rounds = 20_000, 1
    with tempfile.TemporaryDirectory(prefix="data-benchmark-") as scratch:
        folder = args.folder or Path(scratch) / "raw"
        if args.what == "pandas":
            pandas_steps(folder, Path(scratch))
            return
        if args.what == "embed":
            tell({"what": "embed", **machine(), **embed(args.texts, args.model, Path(scratch), args.rounds)}, args.out)
            return
        sizes = SIZES["large" if args.what == "large" else "compare"]
        if args.events:
            sizes = (args.events, args.events // 10, args.events // 20)
        generate(folder, *sizes)
        if args.what == "generate":
            return
        metrics = {"what": args.what, "events": sizes[0], "users": sizes[1], "items": sizes[2], **machine()}
        metrics |= CASES[args.what](folder, Path(scratch), args.rounds)
        tell(metrics, args.out)


def tell(metrics: dict, out: Path | None) -> None:
    print(json.dumps(metrics, indent=2))
    if out:
        out.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def machine() -> dict:
    import pandas as pd

    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            check=False).stdout.strip()
    return {"commit": commit, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
            "duckdb": duckdb.__version__, "pandas": pd.__version__}


def generate(folder: Path, num_events: int, num_users: int, num_items: int) -> None:
    """Write generated reviews and metadata as gzipped JSON lines. The values are hashes, so all runs write the same."""
    folder.mkdir(parents=True, exist_ok=True)
    reviews, metadata = folder / f"{NAME}.json.gz", folder / f"meta_{NAME}.json.gz"
    if reviews.exists() and metadata.exists():
        return
    word = f"{WORDS}[1 + (hash(i * 64 + w) % {len(WORDS)})::INTEGER]"
    # Half of the events are distributed evenly over all items, so that the 5-core keeps most items. The other half
    # belongs to popular items.
    duckdb.execute(f"""
        COPY (SELECT 5.0 - (hash(i * 3) % 5)::INTEGER AS overall,
                     'A' || printf('%013d', (hash(i) % {num_users})::BIGINT) AS "reviewerID",
                     'B' || printf('%09d', CASE WHEN i % 2 = 0 THEN (hash(i * 7) % {num_items})::BIGINT
                     ELSE floor({num_items} * pow((hash(i * 11) % 1000000)::DOUBLE / 1000000, 3))::BIGINT END) AS asin,
                     1300000000 + (hash(i * 5) % 200000000)::BIGINT AS "unixReviewTime",
                     'Works as described.' AS summary
              FROM range({num_events}) r(i)) TO '{reviews}' (FORMAT json, COMPRESSION gzip)""")
    words = {begin: f"array_to_string(list_transform(range({begin}, {end}), lambda w: {word}), ' ')"
            for begin, end in ((0, 6), (8, 38), (40, 60))}
    duckdb.execute(f"""
        COPY (SELECT 'B' || printf('%09d', i) AS asin, {words[0]} || ' no. ' || i AS title,
                     [{words[8]} || '. <b>New</b> &amp; tested.', {words[40]}] AS description,
                     'Brand ' || i % 977 AS brand, '$' || (i % 9000) / 100 AS price,
                     ['Industrial & Scientific', 'Group ' || i % 41] AS category,
                     ['fits ' || i % 13, 'weighs ' || i % 7 || ' lb'] AS feature
              FROM range({num_items}) r(i)) TO '{metadata}' (FORMAT json, COMPRESSION gzip)""")


def ours(folder: Path, scratch: Path, source: str = "amazon18") -> dict:
    target = scratch / f"ours-{time.monotonic_ns()}"
    return measured([sys.executable, "-P", "-m", "dataloader.process", "--dataset", NAME, "--source", source,
                     "--raw_dir", str(folder), "--data_root", str(target)])


def literals(folder: Path, scratch: Path, rounds: int) -> dict:
    """Measure the data stage on metadata that is written as Python dicts, as in Amazon 2014.

    The description is a text. The categories are a list of lists.
    """
    raw = scratch / "literals"
    raw.mkdir()
    (raw / f"reviews_{NAME}_5.json.gz").symlink_to((folder / f"{NAME}.json.gz").resolve())
    with gzip.open(folder / f"meta_{NAME}.json.gz", "rt", encoding="utf-8") as lines, \
            gzip.open(raw / f"meta_{NAME}.json.gz", "wt", encoding="utf-8", compresslevel=1) as out:
        for item in map(json.loads, lines):
            out.write(repr({**item, "description": " ".join(item["description"]), "price": float(item["price"][1:]),
                            "categories": [item.pop("category")], "related": {"also_bought": [item["asin"]] * 20}}))
            out.write("\n")
    return medians([ours(raw, scratch, "amazon14") for _ in range(rounds)])


def delimited(folder: Path, scratch: Path, rounds: int) -> dict:
    raw = scratch / "csv"
    raw.mkdir()
    for query, name in ((f"""SELECT "reviewerID" AS user_id, asin AS item_id, "unixReviewTime" AS timestamp,
                                    overall AS rating FROM '{folder}/{NAME}.json.gz'""", "interactions"),
                        (f"""SELECT asin AS item_id, title, array_to_string(description, ' ') AS description, brand,
                                    price FROM '{folder}/meta_{NAME}.json.gz'""", "items")):
        duckdb.execute(f"COPY ({query}) TO '{raw}/{name}.csv' (HEADER)")
    return medians([ours(raw, scratch, "local") for _ in range(rounds)])


def collaborative(folder: Path, scratch: Path, rounds: int) -> dict:
    target = scratch / "cf"
    flags = ["--dataset", NAME, "--source", "amazon18", "--raw_dir", str(folder), "--data_root", str(target)]
    measured([sys.executable, "-P", "-m", "dataloader.process", *flags])
    return medians([measured([sys.executable, "-P", "-m", "dataloader.fusion", "--suffix", "cf", "--force", *flags])
                    for _ in range(rounds)])


def medians(runs: list[dict]) -> dict:
    return {"median_seconds": statistics.median(run["seconds"] for run in runs),
            "seconds": [run["seconds"] for run in runs], "peak_gb": max(run["peak_gb"] for run in runs),
            "output": runs[0]["output"]}


def measured(command: list[str]) -> dict:
    """Run a command; return its seconds, its peak resident memory in GB, and the lines of its output."""
    begun = time.monotonic()
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    output = child.stdout.read()
    _pid, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{output}")
    return {"seconds": round(time.monotonic() - begun, 2), "peak_gb": round(usage.ru_maxrss / 2**20, 2),
            "output": output.strip().splitlines()}


def large(folder: Path, scratch: Path, rounds: int) -> dict:
    """Measure one run on a large dataset; it takes minutes."""
    raw = sum(path.stat().st_size for path in folder.iterdir()) / 2**30
    return {"raw_gb": round(raw, 2), "ours": ours(folder, scratch)}


def compare(folder: Path, scratch: Path, rounds: int) -> dict:
    """Run the data stage and pandas in turns on the same files, in separate processes, and compare the medians."""
    runs = {"ours": [], "pandas": []}
    for _ in range(rounds):
        runs["ours"].append(ours(folder, scratch))
        runs["pandas"].append(measured([sys.executable, __file__, "pandas", "--folder", str(folder)]))
    seconds = {name: statistics.median(run["seconds"] for run in results) for name, results in runs.items()}
    return {"median_seconds": seconds, "times_as_fast": round(seconds["pandas"] / seconds["ours"], 2),
            "peak_gb": {name: max(run["peak_gb"] for run in results) for name, results in runs.items()},
            "seconds": {name: [run["seconds"] for run in results] for name, results in runs.items()},
            "counts": {name: results[0]["output"][-1 if name == "pandas" else 1:] for name, results in runs.items()}}


def embed(texts_file: Path, model: Path, scratch: Path, rounds: int) -> dict:
    """Embed all texts with our code and with only the library, in turns.

    Our code uses shards and a cache. In each turn, the cache is empty at the beginning.
    """
    sys.path[0] = str(ROOT)
    import numpy as np

    from dataloader.embeddings.cache import VectorCache
    from dataloader.embeddings.encode import Texts, encode_all
    from dataloader.embeddings.sentence import SentenceEncoder

    texts = list(dict.fromkeys(texts_file.read_text(encoding="utf-8").splitlines()))
    encoder = SentenceEncoder(model, ["cpu"], half=False)
    raw_ids = np.array([str(number) for number in range(len(texts))], dtype=object)
    items = Texts(np.array(texts, dtype=object), raw_ids, texts_file)
    encoder.model.encode(texts[:64], show_progress_bar=False)  # warm-up
    seconds, vectors = {"bare": [], "ours": []}, {}
    for number in range(rounds):
        for name in sorted(seconds, reverse=number % 2 == 1):
            begun = time.perf_counter()
            vectors[name] = (encoder.model.encode(texts, show_progress_bar=False) if name == "bare" else
                            encode_all(encoder, items, VectorCache(scratch / str(number), encoder.identity)))
            seconds[name].append(round(time.perf_counter() - begun, 2))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"texts": len(texts), "median_seconds": medians, "seconds": seconds,
            "ours_over_bare": round(medians["ours"] / medians["bare"], 3),
            "largest_difference": float(np.abs(vectors["bare"] - vectors["ours"]).max())}


def pandas_steps(folder: Path, target: Path) -> None:
    """Run the steps of the data stage in pandas: read, 5-core, number, sort, split, clean, write."""
    import html
    import re

    import pandas as pd

    events = pd.read_json(folder / f"{NAME}.json.gz", lines=True, dtype={"asin": str, "reviewerID": str})
    events = events[["reviewerID", "asin", "unixReviewTime", "overall"]].reset_index(names="line")
    before = -1
    while before != len(events):
        before = len(events)
        for column in ("reviewerID", "asin"):
            events = events[events.groupby(column)["line"].transform("size") >= 5]
    events["user"], users = pd.factorize(events["reviewerID"])
    events["item"], items = pd.factorize(events["asin"])
    events = events.sort_values(["user", "unixReviewTime", "line"])
    from_end = events.groupby("user").cumcount(ascending=False)
    events["split"] = from_end.map({0: "test", 1: "valid"}).fillna("train")
    metadata = pd.read_json(folder / f"meta_{NAME}.json.gz", lines=True, dtype={"asin": str})
    metadata = metadata[metadata["asin"].isin(items)].drop_duplicates("asin")
    tag, blanks = re.compile(r"<[^<>]{1,500}>"), re.compile(r"\s+")

    def clean(value: object) -> str:
        text = " ".join(value) if isinstance(value, list) else str(value or "")
        return blanks.sub(" ", tag.sub(" ", html.unescape(text))).strip()

    metadata["title"] = metadata["title"].map(clean)
    metadata["text"] = metadata["title"] + ". " + metadata["description"].map(clean)
    table = pd.DataFrame({"item": range(len(items)), "raw_id": items}).merge(
        metadata[["asin", "title", "text"]], left_on="raw_id", right_on="asin", how="left").drop(columns="asin")
    table["text"] = table["text"].fillna(table["raw_id"])
    table.to_parquet(target / "items.parquet")
    pd.DataFrame({"user": range(len(users)), "raw_id": users}).to_parquet(target / "users.parquet")
    events[["user", "item", "unixReviewTime", "overall", "split"]].to_parquet(target / "interactions.parquet")
    print(f"{len(users):,} users, {len(items):,} items, {len(events):,} interactions")


CASES = {"compare": compare, "large": large, "literals": literals, "csv": delimited, "cf": collaborative}

if __name__ == "__main__":
    main()
