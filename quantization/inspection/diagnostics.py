"""Diagnostics of a tokenizer: what each metric means, and which settings to try."""

from common.config import Config
from quantization.models.abstract_vq import AbstractVQ

# Thresholds for calling the value of a metric good or bad.
GOOD_COLLISIONS, BAD_COLLISIONS = 0.02, 0.10
GOOD_UTILIZATION, BAD_UTILIZATION = 0.95, 0.70
EVEN_GINI, UNEVEN_GINI = 0.35, 0.60
GOOD_COHERENCE = 2.0  # ratio to the value of random pairs, or to the value expected by chance
SHOWN_PREFIXES = 4    # maximum prefix length in the report
SHOWN_LEVELS = 6      # if more levels than this are well used, they share one line


def diagnose(metrics: dict, settings: dict) -> list[str]:
    """Return the lines of the report: each metric, its meaning, and settings to try if the metric is bad.

    settings: the result of `settings_of`; the report suggests only these settings
    """
    return [*_reconstruction(metrics, settings), _collisions(metrics, settings), _bucket(metrics),
            *_levels(metrics, settings), *_prefixes(metrics), *_behaviour(metrics)]


def settings_of(config: Config, model: AbstractVQ, num_items: int) -> dict:
    """Return the settings that the report can suggest to change, with their values.

    These are the model parameters. For a model that is trained by gradient descent, they also include the number of
    epochs and the learning rate.
    """
    params, training = config[config.name]["model_params"], config.training_params
    settings = {**params, **(params.get("codebook") or {}), "num_items": num_items}
    if "codebook_size" in params and model.codebook_sizes:
        settings["codebook_size"] = max(model.codebook_sizes)  # replaces `auto`
    if type(model).fit is AbstractVQ.fit:
        settings |= {"epochs": training["epochs"], "max_steps": training["max_steps"]}
    if any(parameter.requires_grad for parameter in model.parameters()):
        settings["lr"] = training["lr"]
    return settings


def collapsed_levels(metrics: dict, min_utilization: float) -> list[int]:
    """Return the indices of the collapsed levels.

    A level has collapsed if the share of its codes in use is less than `min_utilization`, or if all items have the same
    code in this level.
    """
    return [level for level, share in enumerate(metrics["utilization"])
            if share < min_utilization or share == metrics["perplexity"][level] == 1]


def collapse_warning(metrics: dict, levels: list[int], settings: dict) -> str:
    """Return a warning about the collapsed levels, with up to three settings to try."""
    shares = [(level + 1, metrics["utilization"][level]) for level in levels]
    used = ", ".join(f"level {level} uses {share:.0%} of its codes" if share < 1 else
                     f"level {level} gives all items the same code" for level, share in shares)
    advice = _advice(settings, "restart_dead", "start", "smaller", "codebook_sizes", "lr", "num_levels", "iterations",
                     "num_values", "epochs")
    return f"the codebooks have collapsed: {used}" + advice


def _any(settings: dict) -> bool:
    return True


# Name of a hint -> the setting, the suggested change, and a function that returns whether the change has an effect.
HINTS = {
    "restart_dead": ("restart_dead", "--restart_dead true", lambda settings: not settings["restart_dead"]),
    "start": ("start", "--start kmeans", lambda settings: settings["start"] != "kmeans"),
    "smaller": ("codebook_size", "a smaller --codebook_size", lambda settings: _size(settings) > 2),
    "larger": ("codebook_size", "a larger --codebook_size",
               lambda settings: 0 < _size(settings) < settings["num_items"]),
    "codebook_sizes": ("codebook_sizes", "--codebook_sizes auto",
                       lambda settings: settings["codebook_sizes"] != "auto"),
    "lr": ("lr", "a lower --lr", _any),
    "num_levels": ("num_levels", "a different --num_levels", _any),
    "more_levels": ("num_levels", "a larger --num_levels", _any),
    "iterations": ("iterations", "a larger --iterations", _any),
    "num_values": ("num_values", "smaller --num_values", lambda settings: any(n > 2 for n in settings["num_values"])),
    "epochs": ("epochs", "a larger --epochs", lambda settings: settings["max_steps"] is None),
    "uniform": ("sinkhorn_levels", "--sinkhorn_levels [-1]", lambda settings: not settings["sinkhorn_levels"]),
}


def _size(settings: dict) -> int:
    """Return the codebook size, or 0 if it is unknown."""
    return settings["codebook_size"] if isinstance(settings["codebook_size"], int) else 0


def _advice(settings: dict, *hints: str) -> str:
    """Return "; try a, b or c" with the first three hints that have an effect, or "" if there are none."""
    chosen = [HINTS[hint] for hint in hints]
    tries = [change for key, change, changes in chosen if key in settings and changes(settings)][:3]
    if not tries:
        return ""
    return "; try " + (tries[0] if len(tries) == 1 else f"{', '.join(tries[:-1])} or {tries[-1]}")


def _reconstruction(metrics: dict, settings: dict) -> list[str]:
    explained = metrics.get("explained_variance")
    if explained is None:
        return []
    word = "most of" if explained > 0.7 else "about half of" if explained > 0.4 else "little of"
    return [f"reconstruction error {metrics['reconstruction_error']:.4g}: the codes explain {word} the variance of the "
            f"embeddings ({max(explained, 0):.0%})"
            + ("" if explained > 0.4 else _advice(settings, "epochs", "more_levels", "larger"))]


def _collisions(metrics: dict, settings: dict) -> str:
    rate = metrics["collision_rate"]
    text = f"collision rate {rate:.2%} before disambiguation: "
    if rate == 0:
        return text + "every item has its own ID"
    if rate <= GOOD_COLLISIONS:
        return text + "nearly every item has its own ID"
    if rate <= BAD_COLLISIONS:
        return text + "some items share an ID"
    return text + "many items share an ID" + _advice(settings, "more_levels", "larger", "uniform")


def _bucket(metrics: dict) -> str:
    largest = metrics["largest_bucket"]
    text = f"largest bucket {largest}: "
    if largest == 1:
        return text + "no two items share an ID"
    return text + (f"at most {largest} items share an ID" if largest <= 10 else
                   f"{largest} items share one ID; check the item texts for duplicates")


def _levels(metrics: dict, settings: dict) -> list[str]:
    levels = range(len(metrics["utilization"]))
    good = [level for level in levels if _is_well_used(metrics, level)]
    if len(good) <= SHOWN_LEVELS:
        return [_level(metrics, level, settings) for level in levels]
    share, perplexity, gini = (sorted(metrics[name][level] for level in good)
                               for name in ("utilization", "perplexity", "gini"))
    least = f"{share[0]:.0%}" if share[0] == 1 else f"at least {share[0]:.0%}"
    return [*(_level(metrics, level, settings) for level in levels if level not in good),
            f"{len(good)} levels use {least} of their codes (perplexity {perplexity[0]:.0f} to {perplexity[-1]:.0f}, "
            f"Gini {gini[0]:.2f} to {gini[-1]:.2f}): well used"]


def _is_well_used(metrics: dict, level: int) -> bool:
    return (metrics["utilization"][level] >= GOOD_UTILIZATION and metrics["perplexity"][level] != 1
            and metrics["gini"][level] <= UNEVEN_GINI)


def _level(metrics: dict, level: int, settings: dict) -> str:
    share, perplexity, gini, dead = (metrics[name][level]
                                     for name in ("utilization", "perplexity", "gini", "num_dead_codes"))
    text = (f"level {level + 1} uses {share:.0%} of its codes "
            f"({dead} dead, perplexity {perplexity:.0f}, Gini {gini:.2f}): ")
    if _is_well_used(metrics, level):
        return text + ("well and evenly used" if gini <= EVEN_GINI else "well used, but unevenly")
    if share < BAD_UTILIZATION or perplexity == 1:
        return text + "probably collapsed" + _advice(settings, "restart_dead", "start", "smaller", "num_values")
    if share < GOOD_UTILIZATION:
        return text + "some codes are unused" + _advice(settings, "restart_dead", "smaller", "num_values")
    return text + "well used, but very unevenly" + _advice(settings, "uniform")


def _prefixes(metrics: dict) -> list[str]:
    lines = []
    base = metrics.get("random_pairs_similarity")
    for level, mean in enumerate(metrics.get("prefix_similarity", [])[:SHOWN_PREFIXES]):
        shared = f"items that share {level + 1} code{'s' if level else ''}"
        ratio = metrics["prefix_coherence"][level]
        if mean is None:
            lines.append(f"prefix coherence: there are no {shared}")
        elif ratio is None:
            lines.append(f"prefix coherence: {shared} have similarity {mean:.2f}, random pairs {base:.2f}")
        else:
            word = ("much more similar than" if ratio >= GOOD_COHERENCE else "somewhat more similar than"
                    if ratio >= 1.1 else "not more similar than")
            lines.append(f"prefix coherence {ratio:.1f}: {shared} are {word} random pairs "
                         f"(similarity {mean:.2f}, random pairs {base:.2f})")
    return lines


def _behaviour(metrics: dict) -> list[str]:
    ratio = metrics.get("behavioral_coherence")
    if ratio is None:
        return []
    word = "much more often" if ratio >= GOOD_COHERENCE else "more often" if ratio >= 1.1 else "not more often"
    return [f"behavioral coherence {ratio:.1f}: consecutive items of a user share their first code {word} than by "
            f"chance ({metrics['same_first_code']:.1%}, by chance {metrics['same_first_code_by_chance']:.1%})"]
