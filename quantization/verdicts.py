"""Each figure of a tokenizer in words: what it means, and what to try."""

from common.config import Config

# From which value on a figure is said to be good, or bad.
GOOD_COLLISIONS, BAD_COLLISIONS = 0.02, 0.10
GOOD_UTILIZATION, BAD_UTILIZATION = 0.95, 0.70
EVEN_GINI, UNEVEN_GINI = 0.35, 0.60
GOOD_COHERENCE = 2.0  # over chance
SHOWN_PREFIXES = 4    # lengths


def verdicts(figures: dict, keys: set[str]) -> list[str]:
    """One line a figure, in the order of the report. What is advised are `keys` that the quantizer has."""
    lines = [*_reconstruction(figures, keys), _collisions(figures, keys), _bucket(figures)]
    for level, share in enumerate(figures["utilization"]):
        lines.append(_level(figures, level, share, keys))
    return [*lines, *_prefixes(figures), *_behaviour(figures)]


def keys_of(config: Config) -> set[str]:
    """The keys of the quantizer's YAML that change its codes; training keys only where something is trained."""
    params = config[config.name]["model_params"]
    trained = {"epochs", "lr"} if "codebook" in params or "hidden_sizes" in params else set()
    return {*params, *(params.get("codebook") or {}), *trained}


def collapsed_levels(figures: dict, least: float) -> list[int]:
    """The levels, from 0, that use less than this share of their codes."""
    return [level for level, share in enumerate(figures["utilization"]) if share < least]


def collapse_warning(figures: dict, levels: list[int], keys: set[str]) -> str:
    """What is wrong, and three keys that may help, of those that the quantizer has."""
    shares = ", ".join(f"level {level + 1} uses {figures['utilization'][level]:.0%} of its codes" for level in levels)
    advice = _advice(keys, "restart_dead", "start", "codebook_size", "codebook_sizes", "lr", "num_levels", "iterations",
                     "num_values", "epochs")
    return f"the codebooks have collapsed: {shares}" + advice


HINTS = {
    "restart_dead": "--restart_dead true", "start": "--start kmeans", "codebook_size": "a smaller --codebook_size",
    "codebook_sizes": "smaller --codebook_sizes", "lr": "a lower --lr", "num_levels": "another --num_levels",
    "iterations": "more --iterations", "num_values": "fewer --num_values", "epochs": "more --epochs",
    "more_levels": "more --num_levels", "larger": "a larger --codebook_size", "uniform": "--sinkhorn_levels [-1]",
}
KEY_OF = {"more_levels": "num_levels", "larger": "codebook_size", "uniform": "sinkhorn_levels"}  # else its own name


def _advice(keys: set[str], *hints: str) -> str:
    """`; try a, b, or c`: the first three of the hints whose key the quantizer has."""
    tries = [HINTS[hint] for hint in hints if KEY_OF.get(hint, hint) in keys][:3]
    if not tries:
        return ""
    return "; try " + (tries[0] if len(tries) == 1 else f"{', '.join(tries[:-1])} or {tries[-1]}")


def _reconstruction(figures: dict, keys: set[str]) -> list[str]:
    explained = figures.get("explained_variance")
    if explained is None:
        return []
    word = "most of" if explained > 0.7 else "about half of" if explained > 0.4 else "little of"
    return [f"reconstruction error {figures['reconstruction_error']:.4g}: the codes keep {word} what tells the "
            f"embeddings apart ({max(explained, 0):.0%} of their variance)"
            + ("" if explained > 0.4 else _advice(keys, "epochs", "more_levels", "larger"))]


def _collisions(figures: dict, keys: set[str]) -> str:
    rate = figures["collision_rate"]
    text = f"collision rate {rate:.2%} before disambiguation: "
    if rate == 0:
        return text + "every item has an ID of its own"
    if rate <= GOOD_COLLISIONS:
        return text + "nearly every item has an ID of its own"
    if rate <= BAD_COLLISIONS:
        return text + "some items share an ID"
    return text + "many items share an ID" + _advice(keys, "more_levels", "larger", "uniform")


def _bucket(figures: dict) -> str:
    largest = figures["largest_bucket"]
    text = f"largest bucket {largest}: "
    if largest == 1:
        return text + "no two items share an ID"
    return text + (f"at most {largest} items share an ID" if largest <= 10 else
                   f"{largest} items share one ID; look for duplicates among the items' texts")


def _level(figures: dict, level: int, share: float, keys: set[str]) -> str:
    perplexity, gini, dead = figures["perplexity"][level], figures["gini"][level], figures["dead_codes"][level]
    text = (f"level {level + 1} uses {share:.0%} of its codes "
            f"({dead} dead, perplexity {perplexity:.0f}, Gini {gini:.2f}): ")
    if share < BAD_UTILIZATION:
        return text + "likely collapse" + _advice(keys, "restart_dead", "start", "codebook_size", "num_values")
    if share < GOOD_UTILIZATION:
        return text + "some codes are wasted" + _advice(keys, "restart_dead", "codebook_size", "num_values")
    if gini > UNEVEN_GINI:
        return text + "all in use, but very unevenly" + _advice(keys, "uniform")
    return text + ("all in use, and evenly" if gini <= EVEN_GINI else "all in use, some much more than others")


def _prefixes(figures: dict) -> list[str]:
    lines = []
    base = figures.get("random_pairs_similarity")
    for level, mean in enumerate(figures.get("prefix_similarity", [])[:SHOWN_PREFIXES]):
        shared = f"items that share {level + 1} code{'s' if level else ''}"
        ratio = figures["prefix_coherence"][level]
        if mean is None:
            lines.append(f"prefix coherence: there are no {shared}")
        elif ratio is None:
            lines.append(f"prefix coherence: {shared} have similarity {mean:.2f}, random pairs {base:.2f}")
        else:
            word = ("far more alike than" if ratio >= GOOD_COHERENCE else "somewhat more alike than" if ratio >= 1.1
                    else "no more alike than")
            lines.append(f"prefix coherence {ratio:.1f}: {shared} are {word} random ones "
                         f"(similarity {mean:.2f} against {base:.2f})")
    return lines


def _behaviour(figures: dict) -> list[str]:
    ratio = figures.get("behavioural_coherence")
    if ratio is None:
        return []
    word = "much more often than" if ratio >= GOOD_COHERENCE else "more often than" if ratio >= 1.1 else "as often as"
    return [f"behavioural coherence {ratio:.1f}: users go on to an item of the same first code {word} chance has it "
            f"({figures['same_first_code']:.1%} against {figures['same_first_code_by_chance']:.1%})"]
