"""The diagnostics of good and bad metrics."""

import re

import pytest

from quantization.inspection.diagnostics import collapse_warning, collapsed_levels, diagnose, settings_of
from quantization.models import names
from tests.quantization.conftest import numbers

SETTINGS = {"num_levels": 3, "codebook_size": 64, "epochs": 10, "max_steps": None, "restart_dead": False,
            "start": "random", "sinkhorn_levels": [], "num_items": 1000}

GOOD = {
    "loss_total": 1.0, "reconstruction_error": 0.2, "explained_variance": 0.8, "collision_rate": 0.01,
    "largest_bucket": 3, "utilization": [1.0, 0.97], "num_dead_codes": [0, 4], "perplexity": [60.4, 58.0],
    "gini": [0.1, 0.3], "random_pairs_similarity": 0.2, "prefix_similarity": [0.5, 0.6],
    "prefix_coherence": [2.5, 3.0], "same_first_code": 0.3, "same_first_code_by_chance": 0.1,
    "behavioral_coherence": 3.0,
}


# The lines of GOOD in the order of the report.
RECONSTRUCTION, COLLISIONS, LARGEST_BUCKET, LEVEL_1, LEVEL_2, PREFIX_1, PREFIX_2, BEHAVIOUR = range(8)


def line_of(number: int, settings: dict = SETTINGS, **metrics) -> str:
    """One line of the report on GOOD with these metrics."""
    return diagnose(GOOD | metrics, settings)[number]


def flags(text: str) -> set[str]:
    return set(re.findall(r"--(\w+)", text))


def check_grades(number: int, grades: list[list[dict]]) -> None:
    """The line uses the same words for all metrics of one grade, and other words for another grade."""
    # Empty settings give no advice; without its numbers, a line depends only on the grade.
    said = [{re.sub(r"-?\d+(\.\d+)?%?", "#", line_of(number, {}, **metrics)) for metrics in grade} for grade in grades]
    assert [len(words) for words in said] == [1] * len(grades)
    assert len(set.union(*said)) == len(grades)


def test_good_metrics_are_reported_in_order_without_advice():
    lines = diagnose(GOOD, SETTINGS)
    assert [sorted(set(numbers(line))) for line in lines] == [sorted(told) for told in (
        {"0.2", "80%"}, {"1.00%"}, {"3"}, {"1", "100%", "0", "60", "0.10"}, {"2", "97%", "4", "58", "0.30"},
        {"2.5", "1", "0.50", "0.20"}, {"3.0", "2", "0.60", "0.20"}, {"3.0", "30.0%", "10.0%"})]
    assert not flags("\n".join(lines))


def test_grades_of_reconstruction():
    grades = [[0.8, 0.71], [0.7, 0.5, 0.41], [0.4, 0.2, -0.3]]
    check_grades(RECONSTRUCTION, [[{"explained_variance": value} for value in grade] for grade in grades])
    assert not flags(line_of(RECONSTRUCTION, explained_variance=0.41))
    for bad in (0.4, 0.2, -0.3):
        assert flags(line_of(RECONSTRUCTION, explained_variance=bad)) == {"epochs", "num_levels", "codebook_size"}


def test_grades_of_collisions():
    check_grades(COLLISIONS, [[{"collision_rate": rate} for rate in grade]
                              for grade in ([0.0], [0.01, 0.02], [0.03, 0.1], [0.11, 0.9])])
    assert not flags(line_of(COLLISIONS, collision_rate=0.1))
    assert flags(line_of(COLLISIONS, collision_rate=0.11)) == {"num_levels", "codebook_size", "sinkhorn_levels"}


def test_grades_of_the_largest_bucket():
    check_grades(LARGEST_BUCKET, [[{"largest_bucket": size} for size in grade] for grade in ([1], [2, 10], [11, 99])])
    assert "11" in numbers(line_of(LARGEST_BUCKET, largest_bucket=11))


def use(share: float, gini: float, perplexity: float = 60.0) -> dict:
    """The metrics of level 1."""
    return {"utilization": [share, 1.0], "gini": [gini, 0.1], "perplexity": [perplexity, 9.0]}


COLLAPSED = [use(0.69, 0.1), use(0.1, 0.9), use(1.0, 0.1, perplexity=1.0)]


def test_grades_of_the_use_of_a_level():
    check_grades(LEVEL_1, [COLLAPSED, [use(0.7, 0.1), use(0.94, 0.9)], [use(1.0, 0.61), use(0.95, 0.9)],
                           [use(1.0, 0.6), use(0.95, 0.36)], [use(0.95, 0.35), use(1.0, 0.0)]])
    for collapsed in COLLAPSED:
        assert flags(line_of(LEVEL_1, **collapsed)) == {"restart_dead", "start", "codebook_size"}
    assert flags(line_of(LEVEL_1, **use(0.94, 0.1))) == {"restart_dead", "codebook_size"}
    assert flags(line_of(LEVEL_1, **use(1.0, 0.61))) == {"sinkhorn_levels"}
    assert not flags(line_of(LEVEL_1, **use(1.0, 0.6)))


def test_a_collapsed_level_is_reported_with_its_number():
    line = line_of(LEVEL_2, utilization=[1.0, 0.61])
    assert {"2", "61%"} <= set(numbers(line))
    assert flags(line) == {"restart_dead", "start", "codebook_size"}


def test_many_well_used_levels_share_one_line():
    """Levels 1 and 9 have problems; the other seven are well used."""
    metrics = {"utilization": [0.5, *[1.0] * 6, 0.96, 1.0], "perplexity": [*[40.0] * 4, 33.4, 51.6, *[40.0] * 3],
               "gini": [0.1, 0.2, 0.3, 0.6, *[0.3] * 4, 0.61], "num_dead_codes": [0] * 9}
    lines = diagnose(GOOD | metrics, SETTINGS)
    assert len(lines) == 9
    assert [numbers(line)[:2] for line in lines[3:5]] == [["1", "50%"], ["9", "100%"]]
    assert numbers(lines[5]) == ["7", "96%", "33", "52", "0.20", "0.60"]
    fewer = {name: values[:7] for name, values in metrics.items()}
    assert [numbers(line)[0] for line in diagnose(GOOD | fewer, SETTINGS)[3:10]] == list("1234567")


def test_grades_of_prefix_coherence():
    check_grades(PREFIX_1, [[{"prefix_coherence": [ratio, 3.0]} for ratio in grade]
                            for grade in ([2.0, 9.0], [1.9, 1.1], [1.0, 0.2])])


def test_a_prefix_without_pairs_has_no_similarity():
    metrics = {"prefix_similarity": [0.4, None], "prefix_coherence": [2.0, None]}
    assert numbers(line_of(PREFIX_2, **metrics)) == ["2"]


def test_without_a_ratio_both_similarities_are_reported():
    line = line_of(PREFIX_1, random_pairs_similarity=-0.01, prefix_similarity=[0.4], prefix_coherence=[None])
    assert {"0.40", "-0.01"} <= set(numbers(line))


def test_grades_of_behavioural_coherence():
    check_grades(BEHAVIOUR, [[{"behavioral_coherence": ratio} for ratio in grade]
                             for grade in ([2.0, 9.0], [1.9, 1.1], [1.0, 0.2])])


CODES_ALONE = {key: GOOD[key] for key in ("collision_rate", "largest_bucket", "utilization", "num_dead_codes",
                                          "perplexity", "gini")}
MEASURED_TOGETHER = [
    ("reconstruction_error", "explained_variance"), ("explained_variance",),
    ("random_pairs_similarity", "prefix_similarity", "prefix_coherence"),
    ("same_first_code", "same_first_code_by_chance", "behavioral_coherence"),
]


@pytest.mark.parametrize("metrics", [
    CODES_ALONE,
    GOOD | {"explained_variance": None, "behavioral_coherence": None},
    GOOD | {"random_pairs_similarity": None, "prefix_similarity": [None, None], "prefix_coherence": [None, None]},
    *({key: value for key, value in GOOD.items() if key not in group} for group in MEASURED_TOGETHER),
])
def test_missing_metrics_are_not_reported(metrics):
    lines = diagnose(metrics, SETTINGS)
    assert len(lines) >= len(diagnose(CODES_ALONE, SETTINGS))
    assert not any("None" in line for line in lines)


def test_a_level_below_the_limit_or_with_one_code_collapsed():
    assert collapsed_levels({"utilization": [1.0, 0.49, 0.5], "perplexity": [9.0, 5.0, 5.0]}, 0.5) == [1]
    assert collapsed_levels({"utilization": [1.0, 1.0], "perplexity": [9.0, 9.0]}, 1.0) == []
    one_code = {"utilization": [1.0], "perplexity": [1.0]}  # with a codebook size inferred from the codes
    assert collapsed_levels(one_code, 0.5) == [0]
    warning = collapse_warning(one_code, [0], {})
    assert numbers(warning) == ["1"]  # the level, without "100%"


@pytest.mark.parametrize(("key", "value", "other", "number", "metrics"), [
    ("restart_dead", True, False, LEVEL_1, {"utilization": [0.6, 1.0]}),
    ("start", "kmeans", "random", LEVEL_1, {"utilization": [0.6, 1.0]}),
    ("codebook_size", 2, 4, LEVEL_1, {"utilization": [0.6, 1.0]}),
    ("codebook_size", 1000, 999, COLLISIONS, {"collision_rate": 0.9}),
    ("sinkhorn_levels", [-1], [], COLLISIONS, {"collision_rate": 0.9}),
    ("num_values", [2, 2], [2, 3], LEVEL_1, {"utilization": [0.6, 1.0]}),
])
def test_advice_changes_the_settings(key, value, other, number, metrics):
    assert flags(line_of(number, {key: value, "num_items": 1000}, **metrics)) == set()
    assert flags(line_of(number, {key: other, "num_items": 1000}, **metrics)) == {key}


def test_more_epochs_do_not_help_if_the_steps_are_limited():
    bad = {"utilization": [0.1], "perplexity": [2.0]}
    assert flags(collapse_warning(bad, [0], {"epochs": 10, "max_steps": None})) == {"epochs"}
    assert flags(collapse_warning(bad, [0], {"epochs": 10, "max_steps": 300})) == set()


def test_settings_hold_resolved_values(make_config, make_model):
    config = make_config("rvq", codebook_size="auto", update="ema")
    settings = settings_of(config, make_model(config, 64), 64)
    assert settings["codebook_size"] == 16  # auto
    assert settings["restart_dead"] is True
    assert "lr" not in settings  # moving averages have no gradient
    config = make_config("rvq", update="gradient")
    assert settings_of(config, make_model(config), 40)["lr"] == 0.01
    config = make_config("rkmeans")
    assert not {"epochs", "lr"} & set(settings_of(config, make_model(config), 40))


BAD = {"utilization": [0.1, 0.9, 1.0], "num_dead_codes": [9, 1, 0], "perplexity": [1.0] * 3, "gini": [0.9] * 3,
       "collision_rate": 0.9, "explained_variance": 0.0}


@pytest.mark.parametrize("name", names())
def test_advice_names_only_keys_of_the_quantizer(name, make_config, make_model):
    config = make_config(name)
    settings = settings_of(config, make_model(config), 40)
    warning = collapse_warning(BAD, [0, 1], settings)
    assert {"1", "10%", "2", "90%"} <= set(numbers(warning))
    advised = flags("\n".join([warning, *diagnose(GOOD | BAD, settings)]))
    assert advised <= set(settings)
    assert len(advised) >= 2 or not {"codebook", "num_values", "iterations"} & set(settings)
