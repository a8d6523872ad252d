"""What is said of good and bad figures."""

import re

import pytest

from quantization.inspection.diagnostics import collapse_warning, collapsed_levels, settings_of, verdicts
from quantization.models import names

SETTINGS = {"num_levels": 3, "codebook_size": 64, "epochs": 10, "max_steps": None, "restart_dead": False,
            "start": "random", "sinkhorn_levels": [], "num_items": 1000}

GOOD = {
    "loss_total": 1.0, "reconstruction_error": 0.2, "explained_variance": 0.8, "collision_rate": 0.01,
    "largest_bucket": 3, "utilization": [1.0, 0.97], "dead_codes": [0, 2], "perplexity": [60.4, 58.0],
    "gini": [0.1, 0.3], "random_pairs_similarity": 0.2, "prefix_similarity": [0.5, 0.6],
    "prefix_coherence": [2.5, 3.0], "same_first_code": 0.3, "same_first_code_by_chance": 0.1,
    "behavioural_coherence": 3.0,
}


def verdict(start: str, **figures) -> str:
    """The one line that begins so."""
    [line] = [line for line in verdicts(GOOD | figures, SETTINGS) if line.startswith(start)]
    return line


def test_good_figures_are_said_to_be_good_in_the_order_of_the_report_and_nothing_is_advised():
    assert verdicts(GOOD, SETTINGS) == [
        "reconstruction error 0.2: the codes keep most of what tells the embeddings apart (80% of their variance)",
        "collision rate 1.00% before disambiguation: nearly every item has an ID of its own",
        "largest bucket 3: at most 3 items share an ID",
        "level 1 uses 100% of its codes (0 dead, perplexity 60, Gini 0.10): all in use, and evenly",
        "level 2 uses 97% of its codes (2 dead, perplexity 58, Gini 0.30): all in use, and evenly",
        "prefix coherence 2.5: items that share 1 code are far more alike than random ones "
        "(similarity 0.50 against 0.20)",
        "prefix coherence 3.0: items that share 2 codes are far more alike than random ones "
        "(similarity 0.60 against 0.20)",
        "behavioural coherence 3.0: users go on to an item of the same first code much more often than chance has it "
        "(30.0% against 10.0%)",
    ]


@pytest.mark.parametrize(("explained", "words", "advice"), [
    (0.8, "most of", False), (0.5, "about half of", False), (0.2, "little of", True), (-0.3, "little of", True)])
def test_reconstruction(explained, words, advice):
    line = verdict("reconstruction error", explained_variance=explained)
    assert f"keep {words} what" in line
    assert ("; try more --" in line) == advice


@pytest.mark.parametrize(("rate", "words", "advice"), [
    (0.0, "every item has an ID of its own", False), (0.02, "nearly every item", False),
    (0.1, "some items share an ID", False), (0.11, "many items share an ID", True)])
def test_collisions(rate, words, advice):
    line = verdict("collision rate", collision_rate=rate)
    assert f": {words}" in line
    assert ("; try more --" in line) == advice


@pytest.mark.parametrize(("largest", "words"), [
    (1, "no two items share an ID"), (10, "at most 10 items share an ID"), (11, "11 items share one ID; look for")])
def test_largest_bucket(largest, words):
    assert words in verdict("largest bucket", largest_bucket=largest)


def test_the_specifications_example_of_a_collapse():
    line = verdict("level 2", utilization=[1.0, 0.61])
    assert line.startswith("level 2 uses 61% of its codes")
    assert "likely collapse; try --" in line


@pytest.mark.parametrize(("share", "gini", "words"), [
    (0.69, 0.1, "likely collapse; try "), (0.94, 0.1, "some codes are wasted; try "),
    (1.0, 0.61, "all in use, but very unevenly; try "), (1.0, 0.6, "all in use, some much more than others"),
    (0.95, 0.35, "all in use, and evenly")])
def test_use_of_a_level(share, gini, words):
    assert f": {words}" in verdict("level 1", utilization=[share, 1.0], gini=[gini, 0.1])


@pytest.mark.parametrize(("ratio", "words"), [
    (2.0, "far more"), (1.1, "somewhat more"), (1.0, "no more"), (0.2, "no more")])
def test_prefix_coherence(ratio, words):
    line = verdict("prefix coherence", prefix_similarity=[0.4], prefix_coherence=[ratio])
    assert f"share 1 code are {words} alike than" in line


def test_prefixes_that_no_two_items_share_are_said_to_be_none():
    line = verdict("prefix coherence:", prefix_similarity=[0.4, None], prefix_coherence=[2.0, None])
    assert line == "prefix coherence: there are no items that share 2 codes"


def test_without_a_ratio_the_two_similarities_stand_side_by_side():
    line = verdict("prefix coherence", random_pairs_similarity=-0.01, prefix_similarity=[0.4], prefix_coherence=[None])
    assert "similarity 0.40, random pairs -0.01" in line


@pytest.mark.parametrize(("ratio", "words"), [
    (2.0, "much more often than"), (1.1, "more often than"), (1.0, "as often as")])
def test_behavioural_coherence(ratio, words):
    assert f"the same first code {words} chance" in verdict("behavioural", behavioural_coherence=ratio)


CODES_ALONE = {key: GOOD[key] for key in ("collision_rate", "largest_bucket", "utilization", "dead_codes",
                                          "perplexity", "gini")}
MEASURED_TOGETHER = [
    ("reconstruction_error", "explained_variance"), ("explained_variance",),
    ("random_pairs_similarity", "prefix_similarity", "prefix_coherence"),
    ("same_first_code", "same_first_code_by_chance", "behavioural_coherence"),
]


@pytest.mark.parametrize("figures", [
    CODES_ALONE,
    GOOD | {"explained_variance": None, "behavioural_coherence": None},
    GOOD | {"random_pairs_similarity": None, "prefix_similarity": [None, None], "prefix_coherence": [None, None]},
    *({key: value for key, value in GOOD.items() if key not in group} for group in MEASURED_TOGETHER),
])
def test_what_was_not_measured_is_not_judged(figures):
    lines = verdicts(figures, SETTINGS)
    assert len(lines) >= len(verdicts(CODES_ALONE, SETTINGS))
    assert not any("None" in line for line in lines)


def test_a_level_has_collapsed_if_it_uses_less_than_the_least_share_or_one_code():
    assert collapsed_levels({"utilization": [1.0, 0.49, 0.5], "perplexity": [9.0, 5.0, 5.0]}, 0.5) == [1]
    assert collapsed_levels({"utilization": [1.0, 1.0], "perplexity": [9.0, 9.0]}, 1.0) == []
    one_code = {"utilization": [1.0], "perplexity": [1.0]}  # the codebook's size is read off the codes
    assert collapsed_levels(one_code, 0.5) == [0]
    assert "level 1 gives all items the same code" in collapse_warning(one_code, [0], SETTINGS)
    assert "likely collapse" in verdict("level 1", utilization=[1.0, 1.0], perplexity=[1.0, 9.0])


@pytest.mark.parametrize(("key", "value", "other", "line", "figures"), [
    ("restart_dead", True, False, "level 1", {"utilization": [0.6, 1.0]}),
    ("start", "kmeans", "random", "level 1", {"utilization": [0.6, 1.0]}),
    ("codebook_size", 2, 4, "level 1", {"utilization": [0.6, 1.0]}),
    ("codebook_size", 1000, 999, "collision rate", {"collision_rate": 0.9}),
    ("sinkhorn_levels", [-1], [], "collision rate", {"collision_rate": 0.9}),
    ("num_values", [2, 2], [2, 3], "level 1", {"utilization": [0.6, 1.0]}),
])
def test_advice_is_a_change_of_the_settings(key, value, other, line, figures):
    def advised(settings: dict) -> str:
        [found] = [found for found in verdicts(GOOD | figures, settings) if found.startswith(line)]
        return found

    assert f"--{key}" not in advised({key: value, "num_items": 1000})
    assert f"--{key}" in advised({key: other, "num_items": 1000})


def test_more_epochs_do_not_help_if_the_steps_are_limited():
    bad = {"utilization": [0.1], "perplexity": [2.0]}
    assert "--epochs" in collapse_warning(bad, [0], {"epochs": 10, "max_steps": None})
    assert "--epochs" not in collapse_warning(bad, [0], {"epochs": 10, "max_steps": 300})


def test_settings_are_the_resolved_ones(make_config, make_model):
    config = make_config("rvq", codebook_size="auto", update="ema")
    settings = settings_of(config, make_model(config, 64), 64)
    assert settings["codebook_size"] == 16  # auto
    assert settings["restart_dead"] is True
    assert "lr" not in settings  # moving averages have no gradient
    config = make_config("rvq", update="gradient")
    assert settings_of(config, make_model(config), 40)["lr"] == 0.01
    config = make_config("rkmeans")
    assert not {"epochs", "lr"} & set(settings_of(config, make_model(config), 40))


BAD = {"utilization": [0.1, 0.9, 1.0], "dead_codes": [9, 1, 0], "perplexity": [1.0] * 3, "gini": [0.9] * 3,
       "collision_rate": 0.9, "explained_variance": 0.0}


@pytest.mark.parametrize("name", names())
def test_no_advice_names_a_key_that_the_quantizer_does_not_have(name, make_config, make_model):
    config = make_config(name)
    settings = settings_of(config, make_model(config), 40)
    warning = collapse_warning(BAD, [0, 1], settings)
    assert "level 1 uses 10% of its codes, level 2 uses 90% of its codes" in warning
    advised = set(re.findall(r"--(\w+)", "\n".join([warning, *verdicts(GOOD | BAD, settings)])))
    assert advised <= set(settings)
    assert len(advised) >= 2 or not {"codebook", "num_values", "iterations"} & set(settings)
