"""What rows would teach, and whether they fit, is said before they are trained."""

from typing import Any

import pytest

from mlx_ft.preflight.rows import trained_context
from tests.support.preflight_inputs import (
    SMOLLM2_135M,
    finding_of,
    quickstart,
    stats_of,
    with_recipe,
)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({}, None),
        ({"max_position_embeddings": 2048, "rope_scaling": None}, 2048),
        ({"n_positions": 1024}, 1024),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 2}}, 2048),
    ],
)
def test_the_context_is_what_the_config_says(config: dict[str, Any], tokens: int | None) -> None:
    assert trained_context(config) == tokens


def test_rows_beyond_the_context_are_counted() -> None:
    config = SMOLLM2_135M | {"max_position_embeddings": 204}
    finding = finding_of("context", quickstart(model_config=config, rows_beyond_context=7))
    assert finding.level == "warn" and "7 of 425 rows are longer, up to 205" in finding.measured
    assert "max_seq_length to 204" in finding.fix
    wide = quickstart(model_config=SMOLLM2_135M | {"max_position_embeddings": 205})
    for facts in (wide, quickstart()):
        assert finding_of("context", facts).level == "ok"


@pytest.mark.parametrize(("answers", "level"), [(0, "warn"), (10, "warn"), (42, "ok"), (60, "ok")])
def test_answers_of_the_base_model_that_are_missing_are_told(answers: int, level: str) -> None:
    stats = stats_of(categories={"replay": answers, "other": 425 - answers})
    facts = with_recipe(quickstart(data_stats=stats), "data", replay=0.1)
    finding = finding_of("replay", facts)
    assert finding.level == level and f"{answers} of 425 rows are answers" in finding.measured


def test_without_a_category_there_is_no_answer_of_the_base_model() -> None:
    assert finding_of("replay", quickstart()).level == "ok"
    stats = stats_of(categories={})
    facts = with_recipe(quickstart(data_stats=stats), "data", replay=0.1)
    assert finding_of("replay", facts).level == "warn"
