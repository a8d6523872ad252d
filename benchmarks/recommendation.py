"""Speed of training and recommendation: our generators, cornac's TIGER and transformers' T5, with the same sizes.

    python benchmarks/recommendation.py train      # targets per second, in turns, medians
    python benchmarks/recommendation.py decode     # users per second with 20 and 50 beams, and the items in common
    python benchmarks/recommendation.py normalize  # ours: probabilities over the codebook or over valid items
    python benchmarks/recommendation.py trie       # ten million IDs in a trie and one beam search, in at most 2 GB
    python benchmarks/recommendation.py graph      # encoder_retrieve: a walk through the graph, and scoring all items
    python benchmarks/recommendation.py seen       # our generators: 2,000 seen items excluded per history, or none

`pip install -r benchmarks/requirements.txt` installs the other libraries. All models use the same number of threads.
The commands trie, graph and seen generate random IDs. The others use the dataset Beauty with LETTER's published IDs,
which these two commands create (pass `--data_root DIR` to all commands to use another folder for the data):

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
sys.path[0] = str(ROOT)  # otherwise `import recommendation` would import this file

from benchmarks.quantization import equal_threads, machine, rounded  # noqa: E402 (needs the path above)

PEERS = {"train": ["cornac", "transformers"], "decode": ["cornac", "transformers"], "normalize": [], "trie": [],
         "graph": [], "seen": []}
DATASET, QUANTIZER, SUFFIX = "Beauty", "imported", "td"
SIZES = {"num_encoder_layers": 4, "num_decoder_layers": 4, "d_model": 128, "d_ff": 1024, "d_kv": 64, "num_heads": 6,
         "dropout": 0.1, "max_history": 20, "batch_size": 256, "lr": 0.001}
BEAMS = (20, 50)
BATCH = {"ours": 128, "transformers": 32}             # histories per batch; cornac decodes one at a time
USERS = {"ours": 512, "transformers": 64, "cornac": 16}  # users per turn
ITEMS = {"trie": 10_000_000, "graph": 100_000, "seen": 20_000}
NUM_SEEN = 2000
LIMIT_GB = 2.0
SKEW = 1.5  # exponent for generated codes; it makes smaller codes more frequent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=PEERS)
    parser.add_argument("--data_root", type=Path, default=ROOT / "data")
    parser.add_argument("--tag", default=None, help="tag of the codes")
    parser.add_argument("--threads", type=int, default=2, help="number of threads of each model")
    parser.add_argument("--rounds", type=int, default=3, help="number of turns of each model")
    parser.add_argument("--batches", type=int, default=10, help="for train: batches per turn of our model")
    parser.add_argument("--peer_batches", type=int, default=3, help="for train: batches per turn of the others")
    parser.add_argument("--seconds", type=float, default=None,
                        help="training time before decode (default: 30) and normalize (default: 90)")
    parser.add_argument("--checkpoint", type=Path, default=None, help="for normalize: folder of a finished run")
    parser.add_argument("--users", type=int, default=500, help="for normalize: users per turn")
    parser.add_argument("--items", type=int, default=None, help=f"number of generated items (default: {ITEMS})")
    parser.add_argument("--codes", type=Path, default=None,
                        help="for trie: build the trie of this .npy file in this process")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write the results to")
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
        raise SystemExit(f"error: peak memory above {LIMIT_GB:g} GB: {metrics['peak_gb']}")


class Data(NamedTuple):
    """The data that all models use."""

    sequences: object                  # recommendation.dataset.Sequences
    catalogue: object                  # recommendation.models.abstract_model.Catalogue
    disambiguation_level: int | None

    @property
    def metrics(self) -> dict:
        return {"dataset": DATASET, "items": self.catalogue.num_items, "sizes": SIZES,
                "codebook_sizes": self.catalogue.codebook_sizes}


def load(args: argparse.Namespace) -> Data:
    """Load events and codes, and set the number of threads of torch."""
    import torch

    from common.artifacts import DatasetFolder, load_codes
    from recommendation.dataset import Sequences
    from recommendation.models.abstract_model import Catalogue

    torch.set_num_threads(args.threads)
    folder = DatasetFolder(args.data_root, DATASET)
    if not folder.interactions.exists() or not folder.codes(QUANTIZER, SUFFIX, args.tag).exists():
        raise SystemExit(f"error: {folder.path}: data or codes not found. Fix: {__doc__[__doc__.index('bash '):]}")
    codes, meta = load_codes(folder, QUANTIZER, SUFFIX, args.tag)
    catalogue = Catalogue(len(codes), torch.from_numpy(codes).long(), meta["codebook_sizes"])
    return Data(Sequences.load(folder, "cpu"), catalogue, meta["disambiguation_level"])


def make_task(data: Data, **keys: object):
    """Return a RecommenderTask for our encoder-decoder. `SIZES` and `keys` override the defaults of the model.

    The softmax is over the whole codebook and the encoder has one position per code, as in the other models, unless
    `keys` changes this.
    """
    import torch

    from common.config import resolve
    from recommendation.models import DEFAULTS, config_path
    from recommendation.models.encoder_decoder.model import EncoderDecoder
    from recommendation.trainer import RecommenderTask

    keys = {**SIZES, "normalize_over": "codebook", "encoder_positions": "code", "lr_schedule": "constant",
            "warmup_steps": 100, "patience": "null", **keys}
    config = resolve("encoder_decoder", config_path("encoder_decoder"), DEFAULTS,
                     [(key, str(value)) for key, value in keys.items()])
    torch.manual_seed(0)
    model = EncoderDecoder(config.for_model(), data.catalogue)
    return RecommenderTask(model.train(), data.sequences, config.training_params, 0, config.name)


def train(args: argparse.Namespace) -> dict:
    """Measure the targets per second of all models in turns. A target is a training event that has a history."""
    from benchmarks.peers import T5, Cornac

    data = load(args)
    cornac, t5 = Cornac(*data, SIZES), T5(*data[:2], SIZES)
    contenders: dict[str, Callable] = {train_on: our_turns(data, train_on, args)
                                       for train_on in ("every_position", "target")}
    contenders |= {name: lambda _turn, peer=peer: peer.train(args.peer_batches)
                   for name, peer in (("cornac", cornac), ("transformers", t5))}
    return {**data.metrics, **in_turns(contenders, args.rounds, "targets_per_second")}


def our_turns(data: Data, train_on: str, args: argparse.Namespace) -> Callable[[int], tuple[int, float]]:
    """Return a function that runs some training steps and returns the number of targets and the seconds.

    The time of a batch depends on the length of its windows. Therefore each turn uses batches from the shortest to the
    longest, and different turns use different batches.
    """
    import numpy as np

    task = make_task(data, train_on=train_on)
    lengths = [task.batches.lengths(0, index) for index in range(task.num_steps)]
    sizes = [int(of_batch.max()) * len(of_batch) for of_batch in lengths]
    num_picked = args.rounds * args.batches
    picks = np.argsort(sizes)[((np.arange(num_picked) + 0.5) * len(sizes) / num_picked).astype(int)]
    task.step(0, int(picks[0]))  # warm-up

    def turn(number: int) -> tuple[int, float]:
        begun, num_targets = time.perf_counter(), 0
        for index in picks[number::args.rounds]:
            task.step(0, int(index))
            num_targets += task.batches.num_targets(0, int(index))
        return num_targets, time.perf_counter() - begun

    return turn


def in_turns(contenders: dict[str, Callable], rounds: int, unit: str) -> dict:
    """Return the median rate of each model, and the ratio of each of our rates to the rate of the faster peer.

    contenders: name -> function; the function gets the number of a turn and returns the amount of work and the seconds
    """
    rates = {name: [] for name in contenders}
    for number in range(rounds):
        for name, turn in contenders.items():
            amount, seconds = turn(number)
            rates[name].append(amount / seconds)
            print(f"  {name}: {rates[name][-1]:.1f} {unit}", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    peer = max(medians[name] for name in ("cornac", "transformers"))
    return {unit: rounded(medians), "times_as_fast_as_the_faster_peer":
            rounded({name: rate / peer for name, rate in medians.items() if name not in ("cornac", "transformers")}),
            "of_turns": {name: [round(rate, 1) for rate in values] for name, values in rates.items()}}


def train_for(task, seconds: float) -> int:
    """Train for some seconds, switch to eval mode, and return the number of steps."""
    begun, step = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        task.step(*divmod(step, task.num_steps))
        step += 1
    task.model.eval()
    return step


def decode(args: argparse.Namespace) -> dict:
    """Measure the users per second of all models in turns, with weights from a short training (`train_on: target`)."""
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
    """Return the rates with `num_beams` beams, and the share of our items that the peers also find."""
    import numpy as np

    sample = users_of(data.sequences, "test", 0, USERS["ours"])
    positions = sample.positions("test")
    picks = np.random.default_rng(0).permutation(len(positions))[:USERS["transformers"]]
    histories = sample.histories(positions[picks], SIZES["max_history"])
    rows = [items[:length].numpy() for items, length in zip(*histories, strict=True)][:USERS["cornac"]]
    parts = list(zip(histories.items.split(BATCH["transformers"]), histories.lengths.split(BATCH["transformers"]),
                     strict=True))
    found: dict[str, np.ndarray] = {}

    def ours() -> np.ndarray:
        return recommended(model, sample, "test", num_beams).items

    def by_t5(per_level: bool = False) -> np.ndarray:
        return np.concatenate([t5.recommend(items[:, :lengths.max()], num_beams, per_level)
                               for items, lengths in parts])

    def turn(name: str, recommend: Callable, _number: int) -> tuple[int, float]:
        begun = time.perf_counter()
        found[name] = recommend()
        return len(found[name]), time.perf_counter() - begun

    contenders = {"ours": ours, "transformers": by_t5, "cornac": lambda: cornac.recommend(rows, num_beams)}
    rates = in_turns({name: lambda number, name=name, do=do: turn(name, do, number) for name, do in contenders.items()},
                     rounds, "users_per_second")
    same = {"cornac": found["cornac"], "transformers, a softmax for each level": by_t5(per_level=True)}
    return {**rates, "items_in_common": {name: round(in_common(found["ours"][picks][:len(theirs)], theirs), 4)
                                         for name, theirs in same.items()}}


def in_common(ours, theirs) -> float:
    """For each row, compute the share of our items that are also in the row of the other model. Return the mean."""
    return float((ours[:, :, None] == theirs[:, None]).any(axis=2).mean())


def users_of(sequences, split: str, turn: int, count: int):
    """Return the sequences of `count` random users with an event in the split; every turn has different users."""
    import numpy as np

    from recommendation.dataset import Sequences

    users = np.random.default_rng(0).permutation(sequences.user[sequences.positions(split)])
    kept = np.isin(sequences.user, users[turn * count:(turn + 1) * count])
    return Sequences(sequences.item[kept], sequences.user[kept], sequences.split[kept])


def recommended(model, sequences, split: str, num_beams: int):
    """Return the predictions of our model: `num_beams` items per user."""
    from recommendation.evaluator import predict

    model.num_beams = num_beams
    return predict(model, sequences, split, {"max_history": SIZES["max_history"], "top_k": num_beams,
                                             "eval_batch_size": BATCH["ours"]}, "all")


def normalize(args: argparse.Namespace) -> dict:
    """Measure users per second and validation metrics with both normalizations, in turns, with the same weights."""
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
    """Return our model, and a text that tells where its weights come from.

    The weights are from a finished run, or from a short training with `train_on: every_position`.
    """
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
    """Measure seconds and peak memory of a process that builds the trie.

    This process must stay small, because the peak memory of a child process includes the size of its parent.
    """
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
    """Return distinct IDs, int32 (N, 4).

    Three levels have 256 codes, and smaller codes are more frequent. The fourth level numbers the IDs that have the
    same first three codes.
    """
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
    """Measure the construction of the trie, and a beam search with random logits."""
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
    """Measure the seconds to build the graph, and the users per second of a walk and of scoring all items.

    Weights and IDs are random, so the results show only the speed, not the quality of the recommendations.
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
    """Measure for both generators how much longer a batch takes if seen items are excluded.

    Weights and IDs are random, so the results show only the speed, not the quality of the recommendations.
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
    """Return the median seconds of two functions, and the median ratio of the second to the first."""
    import torch

    seconds = {way: [] for way in ways}
    with torch.inference_mode():
        for number in range(-1, rounds):  # round -1 is a warm-up
            for way, do in ways.items():
                begun = time.perf_counter()
                do()
                if number >= 0:
                    seconds[way].append(time.perf_counter() - begun)
    first, second = seconds.values()
    ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
    return {"seconds": rounded({way: statistics.median(values) for way, values in seconds.items()}),
            "times_as_long": round(ratio, 3)}


if __name__ == "__main__":
    main()
