"""Time and memory of the counting baselines on generated events.

python benchmarks/counting.py --model transitions --num_items 1000000 --num_events 10000000 --events_per_user 10
"""

import argparse
import json
import logging
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402 (after the path)
import torch  # noqa: E402

from common.config import resolve  # noqa: E402
from recommendation.counting.neighbours import NUM_NEAREST, neighbours_of_texts  # noqa: E402
from recommendation.dataset import Sequences  # noqa: E402
from recommendation.models import DEFAULTS, config_path, find_class  # noqa: E402
from recommendation.models.abstract_model import Catalogue, ItemNeighbours  # noqa: E402

NUM_RANKED = 512  # test histories to rank


def generate(num_items: int, num_events: int, events_per_user: int) -> Sequences:
    """Return random sequences. Users stay near one place in the catalogue, and small item numbers are popular."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(num_events // events_per_user), events_per_user)
    near = rng.random(num_events // events_per_user)[user] + 0.01 * rng.standard_normal(len(user))
    item = ((near % 1) ** 3 * num_items).astype(np.int64)
    place = np.arange(len(user)) % events_per_user
    split = np.where(place == events_per_user - 1, 2, np.where(place == events_per_user - 2, 1, 0)).astype(np.int8)
    return Sequences(item, user, split)


def texts(num_items: int) -> list[str]:
    rng = np.random.default_rng(1)
    words = (rng.random((num_items, 6)) ** 3 * 50_000).astype(int)
    return [" ".join(f"w{word}" for word in row) for row in words]


def random_neighbours(num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Return as many neighbours as `neighbours_of_texts`, without the comparison of all pairs of items."""
    rng = np.random.default_rng(2)
    items = (np.arange(num_items)[:, None] + rng.integers(1, 1000, (num_items, NUM_NEAREST))) % num_items
    return items, rng.random(items.shape, dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="transitions", choices=["transitions", "neighbours", "counting"])
    parser.add_argument("--num_items", type=int, default=100_000)
    parser.add_argument("--num_events", type=int, default=1_000_000)
    parser.add_argument("--events_per_user", type=int, default=10)
    parser.add_argument("--random_neighbours", action="store_true",
                        help="do not compare the texts of all items, which takes about 20 minutes for a million")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sequences = generate(args.num_items, args.num_events, args.events_per_user)
    model_class, neighbours, start = find_class(args.model), {}, time.monotonic()
    if model_class.needs_neighbours:
        nearest = (random_neighbours(args.num_items) if args.random_neighbours else
                   neighbours_of_texts(texts(args.num_items)))
        neighbours["tfidf"] = ItemNeighbours(*map(torch.from_numpy, nearest))
    found = {**vars(args), "neighbours_seconds": round(time.monotonic() - start, 1)}
    config = resolve(args.model, config_path(args.model), DEFAULTS, []).for_model()
    model = model_class(config, Catalogue(args.num_items, None, [], neighbours))
    start = time.monotonic()
    model.fit(sequences.training_sequences(), sequences.validation_events())
    found["fit_seconds"] = round(time.monotonic() - start, 1)
    histories = sequences.histories(sequences.positions("test")[:NUM_RANKED], 50)
    start = time.monotonic()
    model.recommend(histories, 20)
    found["ranked_per_second"] = round(NUM_RANKED / (time.monotonic() - start), 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({**found, **model.properties(), "num_entries": len(model.all_items.columns),
                      "peak_gib": round(peak, 2)}))


if __name__ == "__main__":
    main()
