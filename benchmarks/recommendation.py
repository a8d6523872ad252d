"""How fast a generator learns and recommends: ours, cornac's TIGER, and transformers' T5, all of the same sizes.

    python benchmarks/recommendation.py train      # targets per second; all in turns, medians
    python benchmarks/recommendation.py decode     # users per second at beam 20 and 50, and whether all find the same
    python benchmarks/recommendation.py normalize  # ours: probabilities over the codebook against over existing IDs
    python benchmarks/recommendation.py trie       # ten million IDs in a trie and one beam search, within 2 GB
    python benchmarks/recommendation.py graph      # encoder_retrieve: walking a graph of items against scoring all
    python benchmarks/recommendation.py seen       # generators: 2,000 seen items a history left out against none

`pip install -r benchmarks/requirements.txt` adds the peers. All get the same threads, and but for trie, graph and seen,
which generate IDs, the same events and codes: Beauty with LETTER's published IDs, as these two commands make them
(`--data_root DIR` moves the data, here too):

    bash dataloader/2_process.sh --dataset Beauty --raw_dir <folder of Beauty.json.gz>
    python quantization/main.py --quantizer_name imported --file <letter_semantic_ids.json> --dataset_name Beauty
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # else `recommendation` would be this file

from benchmarks.quantization import equal_threads, machine, rounded  # noqa: E402 (the path comes first)

PEERS = {"train": ["cornac", "transformers"], "decode": ["cornac", "transformers"], "normalize": [], "trie": [],
         "graph": [], "seen": []}
DATASET, QUANTIZER, SUFFIX = "Beauty", "imported", "td"
SIZES = {"num_encoder_layers": 4, "num_decoder_layers": 4, "d_model": 128, "d_ff": 1024, "d_kv": 64, "num_heads": 6,
         "dropout": 0.1, "max_history": 20, "batch_size": 256, "lr": 0.001}
BEAMS = (20, 50)
BATCH = {"ours": 128, "transformers": 32}             # histories that are decoded together; cornac takes one
USERS = {"ours": 512, "transformers": 64, "cornac": 16}  # of a round
ITEMS = {"trie": 10_000_000, "graph": 100_000, "seen": 20_000}
NUM_SEEN = 2000
LIMIT_GB = 2.0
SKEW = 1.5  # of generated codes: the smaller, the more frequent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=PEERS)
    parser.add_argument("--data_root", type=Path, default=ROOT / "data")
    parser.add_argument("--tag", default=None, help="of the codes")
    parser.add_argument("--threads", type=int, default=2, help="of everyone")
    parser.add_argument("--rounds", type=int, default=3, help="everyone's turns")
    parser.add_argument("--batches", type=int, default=10, help="of a turn of ours in train")
    parser.add_argument("--peer_batches", type=int, default=3, help="of a turn of the others in train; all are alike")
    parser.add_argument("--seconds", type=float, default=None, help="of training before decode (30) and normalize (90)")
    parser.add_argument("--checkpoint", type=Path, default=None, help="for normalize: the folder of a finished run")
    parser.add_argument("--users", type=int, default=500, help="of a turn in normalize, other ones each turn")
    parser.add_argument("--items", type=int, default=None, help=f"generated ones: {ITEMS}")
    parser.add_argument("--codes", type=Path, default=None, help="for trie: a .npy; build it in this process")
    parser.add_argument("--out", type=Path, default=None, help="write the figures there as JSON")
    args = parser.parse_args()
    args.items = args.items or ITEMS.get(args.what)
    equal_threads(args.threads)
    if args.codes:
        print(json.dumps(build_and_search(args.codes)))
        return
    metrics = {"what": args.what, **machine(args.threads, "cpu", PEERS[args.what])}
    print(json.dumps(metrics), flush=True)
    metrics |= {"train": train, "decode": decode, "normalize": normalize, "trie": trie, "graph": graph,
                "seen": seen}[args.what](args)
    print(json.dumps(metrics, indent=2))
    if args.out:
        args.out.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    if args.what == "trie" and metrics["peak_gb"] > LIMIT_GB:
        raise SystemExit(f"error: more than {LIMIT_GB:g} GB: {metrics['peak_gb']}")


class Data(NamedTuple):
    """What everyone gets."""

    sequences: object                  # recommendation.dataset.Sequences
    catalogue: object                  # recommendation.models.abstract_model.Catalogue
    disambiguation_level: int | None

    @property
    def metrics(self) -> dict:
        return {"dataset": DATASET, "items": self.catalogue.num_items, "sizes": SIZES,
                "codebook_sizes": self.catalogue.codebook_sizes}


def load(args: argparse.Namespace) -> Data:
    """Events and codes; and torch gets its threads."""
    import torch

    from common.artifacts import DatasetFolder, load_codes
    from recommendation.dataset import Sequences
    from recommendation.models.abstract_model import Catalogue

    torch.set_num_threads(args.threads)
    folder = DatasetFolder(args.data_root, DATASET)
    if not folder.interactions.exists() or not folder.codes(QUANTIZER, SUFFIX, args.tag).exists():
        raise SystemExit(f"error: {folder.path} lacks the data or the codes. Fix: {__doc__[__doc__.index('bash '):]}")
    codes, meta = load_codes(folder, QUANTIZER, SUFFIX, args.tag)
    catalogue = Catalogue(len(codes), torch.from_numpy(codes).long(), meta["codebook_sizes"])
    return Data(Sequences.load(folder, "cpu"), catalogue, meta["disambiguation_level"])


def make_task(data: Data, **keys: object):
    """Our encoder-decoder in the stage's own training task, with its defaults but for `SIZES`, `keys`, and a softmax
    over the whole codebook, which is what the others have."""
    import torch

    from common.config import resolve
    from recommendation.models import DEFAULTS, config_path
    from recommendation.models.encoder_decoder.model import EncoderDecoder
    from recommendation.trainer import RecommenderTask

    keys = {**SIZES, "normalize_over": "codebook", "lr_schedule": "constant", "warmup_steps": 100, "patience": "null",
            **keys}
    config = resolve("encoder_decoder", config_path("encoder_decoder"), DEFAULTS,
                     [(key, str(value)) for key, value in keys.items()])
    torch.manual_seed(0)
    model = EncoderDecoder(config.for_model(), data.catalogue)
    return RecommenderTask(model.train(), data.sequences, config.training_params, 0, config.name)


def train(args: argparse.Namespace) -> dict:
    """Targets per second of everyone in turns; a target is an event of training that has a history."""
    from benchmarks.peers import T5, Cornac

    data = load(args)
    cornac, t5 = Cornac(*data, SIZES), T5(*data[:2], SIZES)
    contenders: dict[str, Callable] = {train_on: our_turns(data, train_on, args)
                                       for train_on in ("every_position", "target")}
    contenders |= {who: lambda _turn, peer=peer: peer.train(args.peer_batches)
                   for who, peer in (("cornac", cornac), ("transformers", t5))}
    return {**data.metrics, **in_turns(contenders, args.rounds, "targets_per_second")}


def our_turns(data: Data, train_on: str, args: argparse.Namespace) -> Callable[[int], tuple[int, float]]:
    """Batches of like length cost much or little: each turn takes some from shortest to longest, others each time."""
    import numpy as np

    task = make_task(data, train_on=train_on)
    cuts = [task.batches.batch(0, index) for index in range(task.num_steps)]
    lengths = [int((cut.ends - cut.starts).max()) * len(cut.starts) for cut in cuts]
    num_picked = args.rounds * args.batches
    picks = np.argsort(lengths)[((np.arange(num_picked) + 0.5) * len(cuts) / num_picked).astype(int)]
    task.step(0, int(picks[0]))  # what is slow only once

    def turn(number: int) -> tuple[int, float]:
        begun, num_targets = time.perf_counter(), 0
        for index in picks[number::args.rounds]:
            task.step(0, int(index))
            num_targets += int((cuts[index].ends - cuts[index].starts - 1).sum() if train_on == "every_position"
                               else len(cuts[index].ends))
        return num_targets, time.perf_counter() - begun

    return turn


def in_turns(contenders: dict[str, Callable], rounds: int, unit: str) -> dict:
    """The median rate of each of ours and of the peers, and ours over the faster peer's.

    A contender gets the turn's number, and returns how much it did and the seconds.
    """
    rates = {who: [] for who in contenders}
    for number in range(rounds):
        for who, turn in contenders.items():
            amount, seconds = turn(number)
            rates[who].append(amount / seconds)
            print(f"  {who}: {rates[who][-1]:.1f} {unit}", flush=True)
    medians = {who: statistics.median(some) for who, some in rates.items()}
    peer = max(medians[who] for who in ("cornac", "transformers"))
    return {unit: rounded(medians), "times_as_fast_as_the_faster_peer":
            rounded({who: rate / peer for who, rate in medians.items() if who not in ("cornac", "transformers")}),
            "of_turns": {who: [round(rate, 1) for rate in some] for who, some in rates.items()}}


def train_for(task, seconds: float) -> int:
    """Steps taken within the time."""
    begun, step = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        task.step(*divmod(step, task.num_steps))
        step += 1
    task.model.eval()
    return step


def decode(args: argparse.Namespace) -> dict:
    """Users per second of everyone in turns, with the weights of a short training of ours (`train_on: target`)."""
    import torch

    from benchmarks.peers import T5, Cornac

    data = load(args)
    task = make_task(data, train_on="target")
    steps = train_for(task, 30.0 if args.seconds is None else args.seconds)
    cornac, t5 = Cornac(*data, SIZES), T5(*data[:2], SIZES)
    metrics = {**data.metrics, "steps_of_training": steps}
    with torch.inference_mode():
        cornac.take_weights(task.model)
        t5.take_weights(task.model)
        for num_beams in BEAMS:
            metrics[f"beam_{num_beams}"] = decode_with(task.model, cornac, t5, data, num_beams, args.rounds)
    return metrics


def decode_with(model, cornac, t5, data: Data, num_beams: int, rounds: int) -> dict:
    """Rates at one number of beams, and the share of our items that the others find too."""
    import numpy as np

    sample = users_of(data.sequences, "test", 0, USERS["ours"])
    positions = sample.positions("test")
    some = np.random.default_rng(0).permutation(len(positions))[:USERS["transformers"]]
    histories = sample.histories(positions[some], SIZES["max_history"])
    rows = [items[:length].numpy() for items, length in zip(*histories, strict=True)][:USERS["cornac"]]
    parts = list(zip(histories.items.split(BATCH["transformers"]), histories.lengths.split(BATCH["transformers"]),
                     strict=True))
    found: dict[str, np.ndarray] = {}

    def ours() -> np.ndarray:
        return recommended(model, sample, "test", num_beams).items

    def by_t5(per_level: bool = False) -> np.ndarray:
        return np.concatenate([t5.recommend(items[:, :lengths.max()], num_beams, per_level)
                               for items, lengths in parts])

    def turn(who: str, recommend: Callable, _number: int) -> tuple[int, float]:
        begun = time.perf_counter()
        found[who] = recommend()
        return len(found[who]), time.perf_counter() - begun

    contenders = {"ours": ours, "transformers": by_t5, "cornac": lambda: cornac.recommend(rows, num_beams)}
    rates = in_turns({who: lambda number, who=who, do=do: turn(who, do, number) for who, do in contenders.items()},
                     rounds, "users_per_second")
    same = {"cornac": found["cornac"], "transformers, a softmax for each level": by_t5(per_level=True)}
    return {**rates, "items_in_common": {who: round(in_common(found["ours"][some][:len(theirs)], theirs), 4)
                                         for who, theirs in same.items()}}


def in_common(ours, theirs) -> float:
    """Mean share of the items of a row that both have."""
    return float((ours[:, :, None] == theirs[:, None]).any(axis=2).mean())


def users_of(sequences, split: str, turn: int, count: int):
    """The sequences of a few users, drawn at random among those with an event in the split; others each turn."""
    import numpy as np

    from recommendation.dataset import Sequences

    users = np.random.default_rng(0).permutation(sequences.user[sequences.positions(split)])
    kept = np.isin(sequences.user, users[turn * count:(turn + 1) * count])
    return Sequences(sequences.item[kept], sequences.user[kept], sequences.split[kept])


def recommended(model, sequences, split: str, num_beams: int):
    """The stage's own predictions, as many for each user as there are beams."""
    from recommendation.evaluator import predict

    model.num_beams = num_beams
    return predict(model, sequences, split, {"max_history": SIZES["max_history"], "top_k": num_beams,
                                             "filter_seen": False, "eval_batch_size": BATCH["ours"]})


def normalize(args: argparse.Namespace) -> dict:
    """Users per second and validation metrics of the same weights with either normalization, in turns."""
    import numpy as np

    from recommendation.evaluator import Predictions, metrics

    data = load(args)
    model, origin = trained(data, args)
    variants = [(over, num_beams) for num_beams in BEAMS for over in ("codebook", "valid_items")]
    seconds, found = {variant: [] for variant in variants}, {variant: [] for variant in variants}
    for number in range(args.rounds):
        sample = users_of(data.sequences, "valid", number, args.users)
        for over, num_beams in variants:
            model.normalize_over, begun = over, time.perf_counter()
            found[over, num_beams].append(recommended(model, sample, "valid", num_beams))
            seconds[over, num_beams].append(time.perf_counter() - begun)
    results = {}
    for (over, num_beams), parts in found.items():
        result = metrics(Predictions(*map(np.concatenate, zip(*parts, strict=True))), model.catalogue.num_items)
        results[f"{over}, beam {num_beams}"] = {
            "users_per_second": round(args.users / statistics.median(seconds[over, num_beams]), 1),
            **{name: round(result[name], 4) for name in ("recall@10", "recall@10_stderr", "ndcg@10", "ndcg@10_stderr")}}
    faster = {f"beam {n}": statistics.median(seconds["codebook", n]) / statistics.median(seconds["valid_items", n])
              for n in BEAMS}
    return {**data.metrics, "weights": origin, "users": args.rounds * args.users, "metrics": results,
            "valid_items_times_as_fast": rounded(faster)}


def trained(data: Data, args: argparse.Namespace):
    """Our model: that of a finished run, or trained here on every position for a while."""
    if args.checkpoint is None:
        task = make_task(data, train_on="every_position")
        steps = train_for(task, 90.0 if args.seconds is None else args.seconds)
        return task.model, f"{steps} steps"
    from common.checkpoint import Checkpoints
    from common.config import resolve
    from recommendation.models import DEFAULTS
    from recommendation.models.encoder_decoder.model import EncoderDecoder

    config = resolve("encoder_decoder", args.checkpoint / "config.yaml", DEFAULTS, [])
    model = EncoderDecoder(config.for_model(), data.catalogue)
    model.load_state_dict(Checkpoints(args.checkpoint / "checkpoints", "the command of its run").load_best()["model"])
    return model.eval(), args.checkpoint.name


def trie(args: argparse.Namespace) -> dict:
    """Seconds and peak memory of a process that builds the trie; this one stays small, as a child's peak begins so."""
    from benchmarks.data import measured

    with tempfile.TemporaryDirectory(prefix="recommendation-benchmark-") as scratch:
        path = Path(scratch) / "codes.npy"
        writer = multiprocessing.get_context("spawn").Process(target=write_codes, args=(path, args.items))
        writer.start()
        writer.join()
        run = measured([sys.executable, __file__, "trie", "--codes", str(path), "--threads", str(args.threads)])
    return {"items": args.items, **json.loads(run["output"][-1]), "peak_gb": run["peak_gb"]}


def write_codes(path: Path, num_items: int) -> None:
    import numpy as np

    np.save(path, generated_codes(num_items))


def generated_codes(num_items: int):
    """Distinct IDs, int32 (N, 4): three skewed levels of 256, and one that counts the items alike so far."""
    import numpy as np

    rng, key = np.random.default_rng(0), np.zeros(num_items, dtype=np.int64)
    codes = np.empty((num_items, 4), dtype=np.int32)
    for level in range(3):
        codes[:, level] = 256 * rng.random(num_items) ** SKEW
        key = 256 * key + codes[:, level]
    order = key.argsort(kind="stable")
    place = np.arange(num_items)
    begins = np.diff(key[order], prepend=-1) > 0
    codes[order, 3] = place - np.maximum.accumulate(np.where(begins, place, 0))
    return codes


def build_and_search(path: Path) -> dict:
    """The trie as the stage builds it, and a beam search over random logits."""
    import numpy as np
    import torch

    from recommendation.decoding.beam_search import beam_search
    from recommendation.decoding.trie import Trie
    from recommendation.models.abstract_model import Catalogue

    codes = np.load(path, allow_pickle=False)
    sizes = [256, 256, 256, int(codes[:, 3].max()) + 1]
    catalogue = Catalogue(len(codes), torch.from_numpy(codes).long(), sizes)
    del codes
    begun = time.perf_counter()
    tree = Trie(catalogue.codes, sizes)
    built = time.perf_counter()
    torch.manual_seed(0)
    found = beam_search(lambda level, last, _parents: torch.randn(*last.shape, sizes[level]), tree, BATCH["ours"],
                        BEAMS[-1], BEAMS[-1])
    return {"codebook_sizes": sizes, "build_seconds": round(built - begun, 2), "beams": BEAMS[-1],
            "search_seconds": round(time.perf_counter() - built, 3), "missing": int((found.items < 0).sum())}


def graph(args: argparse.Namespace) -> dict:
    """Seconds to build the graph over generated IDs, and users per second by a walk through it and by scoring all.

    Weights and IDs are random: they make the time, not the answers. How good those are, a trained model shows.
    """
    import numpy as np
    import torch

    from common.config import resolve
    from recommendation.models import DEFAULTS, config_path
    from recommendation.models.abstract_model import Catalogue, Windows
    from recommendation.models.encoder_retrieve.model import EncoderRetrieve

    torch.set_num_threads(args.threads)
    rng, sizes = np.random.default_rng(0), [256] * 16
    codes = torch.from_numpy(rng.integers(256, size=(args.items, len(sizes))))
    config = resolve("encoder_retrieve", config_path("encoder_retrieve"), DEFAULTS, [("scoring", "graph")])
    torch.manual_seed(0)
    model = EncoderRetrieve(config.for_model(), Catalogue(args.items, codes, sizes)).eval()
    histories = Windows(torch.from_numpy(rng.integers(args.items, size=(BATCH["ours"], SIZES["max_history"]))),
                        torch.full((BATCH["ours"],), SIZES["max_history"]))
    begun = time.perf_counter()
    model.prepare()
    built, seconds = time.perf_counter() - begun, {"graph": [], "exact": []}
    ready = {"graph": model.graph, "exact": None}
    with torch.inference_mode():
        for _ in range(args.rounds):
            for scoring, times in seconds.items():
                model.graph, begun = ready[scoring], time.perf_counter()
                model.recommend(histories, 10)
                times.append(time.perf_counter() - begun)
    rates = {scoring: BATCH["ours"] / statistics.median(times) for scoring, times in seconds.items()}
    return {"items": args.items, "codebook_sizes": sizes, "build_seconds": round(built, 1),
            "users_per_second": rounded(rates), "times_as_fast": round(rates["graph"] / rates["exact"], 2)}


def seen(args: argparse.Namespace) -> dict:
    """Seconds of a batch of both generators with seen items left out over those with none left out, in pairs.

    Weights and IDs are random: they make the time, not the answers.
    """
    import numpy as np
    import torch

    from common.config import resolve
    from recommendation.models import DEFAULTS, config_path, find_class
    from recommendation.models.abstract_model import Catalogue, Windows

    torch.set_num_threads(args.threads)
    rng, codes = np.random.default_rng(0), generated_codes(args.items)
    catalogue = Catalogue(args.items, torch.from_numpy(codes).long(), [256, 256, 256, int(codes[:, 3].max()) + 1])
    rows = torch.from_numpy(np.stack([rng.permutation(args.items)[:NUM_SEEN] for _ in range(BATCH["ours"])]))
    metrics = {}
    for name in ("encoder_decoder", "decoder_only"):
        for over in ("codebook", "valid_items"):
            config = resolve(name, config_path(name), DEFAULTS, [("normalize_over", over)])
            torch.manual_seed(0)
            model = find_class(name)(config.for_model(), catalogue).eval()
            width, top_k = config.training_params["max_history"], config.training_params["top_k"]
            histories = Windows(rows[:, :width], torch.full((len(rows),), width))
            ways = {"all": lambda: model.recommend(histories, top_k),                 # noqa: B023 (called at once)
                    "unseen": lambda: model.recommend_unseen(histories, rows, top_k)}  # noqa: B023
            metrics[f"{name}, {over}"] = in_pairs(ways, args.rounds)
    return {"items": args.items, "histories": len(rows), "seen": NUM_SEEN, "metrics": metrics}


def in_pairs(ways: dict[str, Callable], rounds: int) -> dict:
    """Median seconds of either way, and the median of the second's over the first's."""
    import torch

    seconds = {way: [] for way in ways}
    with torch.inference_mode():
        for number in range(-1, rounds):  # the first is slow only once
            for way, do in ways.items():
                begun = time.perf_counter()
                do()
                if number >= 0:
                    seconds[way].append(time.perf_counter() - begun)
    first, second = seconds.values()
    ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
    return {"seconds": rounded({way: statistics.median(some) for way, some in seconds.items()}),
            "times_as_long": round(ratio, 3)}


if __name__ == "__main__":
    main()
