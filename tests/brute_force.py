"""Ranking metrics counted list by list in plain Python, as an outside tool would from predictions.jsonl."""

import math


def brute_force(items: list[list], targets: list, num_items: int) -> dict[str, float]:
    """Every figure over all lists, from the items in their order; -1 stands where a list has none."""
    figures: dict = {}
    for cutoff in (1, 5, 10, 20):
        of_metric: dict[str, list[float]] = {"recall": [], "ndcg": [], "mrr": []}
        listed = set()
        for row, target in zip(items, targets, strict=True):
            rank = next((place for place, item in enumerate(row, start=1) if item == target), None)
            found = rank is not None and rank <= cutoff
            listed.update(item for item in row[:cutoff] if item != -1)
            of_metric["recall"].append(1.0 if found else 0.0)
            of_metric["ndcg"].append(1 / math.log2(rank + 1) if found else 0.0)
            of_metric["mrr"].append(1 / rank if found else 0.0)
        figures[f"coverage@{cutoff}"] = len(listed) / num_items
        for name, values in of_metric.items():
            mean = sum(values) / len(values)
            figures[f"{name}@{cutoff}"] = mean
            figures[f"{name}@{cutoff}_stderr"] = math.sqrt(sum((v - mean) ** 2 for v in values)) / len(values)
    return figures


def best_unseen(scores: dict[int, float], seen: list[int], top_k: int) -> tuple[list[int], list[float]]:
    """The items with the highest scores that are not seen, and their scores; among equals the smaller item."""
    best = sorted(scores.keys() - set(seen), key=lambda item: (-scores[item], item))[:top_k]
    missing = top_k - len(best)
    return best + [-1] * missing, [scores[item] for item in best] + [float("-inf")] * missing


def buckets(counts: list[int]) -> list[str]:
    """Each item's bucket of popularity, by its number of training events."""
    names, before = [""] * len(counts), 0
    for item in sorted(range(len(counts)), key=lambda item: counts[item]):
        names[item] = "cold" if not counts[item] else ("tail", "middle", "head")[min(3 * before // sum(counts), 2)]
        before += counts[item]
    return names


def of_bucket(name: str, items: list[list], targets: list, bucket_of: dict) -> dict:
    """What metrics.json says of one bucket."""
    inside = [(row, target) for row, target in zip(items, targets, strict=True) if bucket_of[target] == name]
    figures = brute_force([row for row, _ in inside], [target for _, target in inside], 1) if inside else {}
    return {"num_items": list(bucket_of.values()).count(name), "num_targets": len(inside),
            **{key: figures.get(key) for key in ("recall@10", "ndcg@10")}}
