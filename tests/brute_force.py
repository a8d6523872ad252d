"""Ranking metrics in plain Python, computed list by list. Another program could use predictions.jsonl in this way."""

import math


def brute_force(items: list[list], targets: list, num_items: int) -> dict[str, float]:
    """Return every metric over all lists.

    items: one list per target, best item first, with -1 at the end of shorter lists
    """
    metrics: dict = {}
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
        metrics[f"coverage@{cutoff}"] = len(listed) / num_items
        for name, values in of_metric.items():
            mean = sum(values) / len(values)
            metrics[f"{name}@{cutoff}"] = mean
            metrics[f"{name}@{cutoff}_stderr"] = math.sqrt(sum((v - mean) ** 2 for v in values)) / len(values)
    return metrics


def best_unseen(scores: dict[int, float], seen: list[int], top_k: int) -> tuple[list[int], list[float]]:
    """Return the unseen items with the highest scores, and their scores.

    If scores are equal, the smaller item is first. If there are fewer than `top_k` unseen items, the remaining
    positions have item -1 and score -inf.
    """
    best = sorted(scores.keys() - set(seen), key=lambda item: (-scores[item], item))[:top_k]
    missing = top_k - len(best)
    return best + [-1] * missing, [scores[item] for item in best] + [float("-inf")] * missing


def buckets(counts: list[int]) -> list[str]:
    """Return the popularity bucket of each item.

    counts: number of training events of each item
    """
    names, before = [""] * len(counts), 0
    for item in sorted(range(len(counts)), key=lambda item: counts[item]):
        names[item] = "cold" if not counts[item] else ("tail", "middle", "head")[min(3 * before // sum(counts), 2)]
        before += counts[item]
    return names


def of_bucket(name: str, items: list[list], targets: list, bucket_of: dict) -> dict:
    """Return the entry of one bucket in metrics.json."""
    inside = [(row, target) for row, target in zip(items, targets, strict=True) if bucket_of[target] == name]
    metrics = brute_force([row for row, _ in inside], [target for _, target in inside], 1) if inside else {}
    return {"num_items": list(bucket_of.values()).count(name), "num_targets": len(inside),
            **{key: metrics.get(key) for key in ("recall@10", "ndcg@10")}}
