"""One list of scorers; reading suites, combined scorers and documentation follow from it."""

from typing import Any

import pytest
from pydantic import ValidationError

from mlx_ft.evaluate.scorers.combined import AllOfKeys, AnyOfKeys
from mlx_ft.evaluate.scorers.keys import ScorerKeys
from mlx_ft.evaluate.scorers.protocol import Scorer
from mlx_ft.evaluate.scorers.registry import SCORERS


def subclasses(of: type[Any]) -> set[type[Any]]:
    return {each for each in of.__subclasses__() if each.__module__.startswith("mlx_ft.")}


def test_every_scorer_is_in_the_list() -> None:
    assert {entry.keys for entry in SCORERS.values()} == subclasses(ScorerKeys)
    assert {entry.rule for entry in SCORERS.values()} == subclasses(Scorer)


@pytest.mark.parametrize("keys", [AnyOfKeys, AllOfKeys])
def test_a_combined_scorer_takes_every_scorer_of_the_list(keys: type[ScorerKeys]) -> None:
    items = keys.model_json_schema()["$defs"][keys.__name__]["properties"]["scorers"]["items"]
    assert set(items["discriminator"]["mapping"]) == set(SCORERS)


@pytest.mark.parametrize("name", SCORERS)
def test_keys_target_and_rule_carry_one_name_and_stand_in_one_file(name: str) -> None:
    keys, rule = SCORERS[name]
    assert keys.__name__ == f"{rule.__name__}Keys"
    assert keys.__module__ == rule.__module__ == keys.target.__module__
    together = f"{rule.__name__}Target"
    assert keys.target.__name__ == ("SeveralTarget" if name.endswith("_of") else together)


def test_combined_scorers_can_hold_each_other() -> None:
    inner = {"name": "any_of", "scorers": [{"name": "exact"}, {"name": "numeric"}]}
    keys = AllOfKeys.model_validate({"name": "all_of", "scorers": [inner, {"name": "talk"}]})
    right = keys.target.model_validate({"of": [{"of": [{"text": "4"}, {"number": 4}]}, {}]})
    assert keys.target_fault(right) is None
    for wrong, fault in (
        ([{}], "1 targets for 2 scorers"),
        ([{"of": [{"text": "4"}]}, {}], "target.of.0: 1 targets for 2 scorers"),
        ([{"of": [{"text": "4"}, {"number": "x"}]}, {}], "target.of.0: target.of.1.number: "),
        ([{"on": []}, {}], "target.of.0.of: "),
    ):
        found = keys.target_fault(keys.target.model_validate({"of": wrong}))
        assert (found or "").startswith(fault)
    with pytest.raises(ValidationError, match="bleu"):
        AnyOfKeys.model_validate({"name": "any_of", "scorers": [{"name": "bleu"}] * 2})
