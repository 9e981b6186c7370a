"""The card tells what was measured, and nothing of the machine it was measured on."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.repocard import metadata_load
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_ft.deploy.model_card import CardFacts, model_card, public_value
from mlx_ft.runs.document import run_document

APACHE = {"license": "apache-2.0", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"}


@pytest.fixture
def document(finished_once: Path) -> dict[str, Any]:
    (run,) = (finished_once / "runs").iterdir()
    return copy.deepcopy(run_document(run))


def card_of(
    document: dict[str, Any], metadata: dict[str, Any] | None = None, column: str = "quantized"
) -> str:
    return model_card(document, CardFacts("me/tiny-model", column, metadata or {}))


def metadata_of(card: str, folder: Path) -> dict[str, Any]:
    (folder / "README.md").write_bytes(card.encode())
    found = metadata_load(folder / "README.md")
    assert found is not None
    return found


def test_the_hub_reads_the_scores_of_the_published_model(
    document: dict[str, Any], tmp_path: Path
) -> None:
    document["eval"] = {
        "first": {"base": {"mean": 0.25, "n": 8}, "fused": {"mean": 0.75, "n": 8}},
        "second": {"base": {"mean": 0.5, "n": 4}},
    }
    (model,) = metadata_of(card_of(document, APACHE, "fused"), tmp_path)["model-index"]
    assert model["name"] == "tiny-model"
    (result,) = model["results"]
    assert result["dataset"]["name"] == "first" and result["dataset"]["args"] == {"prompts": 8}
    (metric,) = result["metrics"]
    assert (metric["type"], metric["value"]) == ("mean_score", 0.75)
    assert "model-index" not in metadata_of(card_of(document, APACHE, "adapter"), tmp_path)
    document["eval"] = None
    assert "model-index" not in metadata_of(card_of(document, APACHE), tmp_path)


def test_the_hub_reads_the_front_matter(document: dict[str, Any], tmp_path: Path) -> None:
    found = metadata_of(card_of(document, APACHE), tmp_path)
    assert found.pop("model-index")
    assert found == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "mlx-ft", "lora"],
    }


# PyYAML writes U+0085 as a line break, and reads that as a space.
TEXTS = st.text(st.characters(exclude_characters="\x85", exclude_categories=["Cs"]), min_size=1)


def test_every_text_of_the_base_is_in_the_front_matter_as_it_is(
    document: dict[str, Any], tmp_path: Path
) -> None:
    """Every other key keeps its value, whatever the base model's README has."""

    @settings(deadline=None)
    @given(TEXTS.filter(str.strip), st.none() | st.integers() | TEXTS, TEXTS)
    @example('mit"\n---\nlibrary_name: evil', "a: b\r\n---", "`#` %\u2028\x07\x7fé")
    @example("on", "1.0", "null")
    @example("unknown", "a", "b")
    def hold(license: str, name: str | int | None, link: str) -> None:
        base = {"license": license, "license_name": name, "license_link": link}
        found = metadata_of(card_of(document, APACHE | base), tmp_path)
        assert found.pop("model-index")
        texts = {key: text for key, text in base.items() if isinstance(text, str) and text.strip()}
        assert found == {
            "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "base_model_relation": "finetune",
            "library_name": "mlx",
            "pipeline_tag": "text-generation",
            "tags": ["mlx", "mlx-ft", "lora"],
            **(texts if license != "unknown" else {"license": "unknown"}),
        }

    hold()


def test_the_command_line_starts_without_the_hub() -> None:
    code = "import sys, mlx_ft.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "huggingface_hub" not in done.stdout.split()


@pytest.mark.parametrize("metadata", [{}, {"license": None}, {"license": ["mit"]}, {"license": ""}])
def test_an_unknown_licence_is_said(
    document: dict[str, Any], tmp_path: Path, metadata: dict[str, Any]
) -> None:
    card = card_of(document, metadata)
    found = metadata_of(card, tmp_path)
    assert found["license"] == "unknown" and "base_model" not in found
    assert "Licence of the base model: unknown." in card


def test_a_licence_of_its_own_keeps_its_name_and_link(
    document: dict[str, Any], tmp_path: Path
) -> None:
    own = {"license": "other", "license_name": "llama3", "license_link": "https://example.org/l"}
    found = metadata_of(card_of(document, own), tmp_path)
    assert {key: found[key] for key in own} == own


def test_a_model_of_the_hub_is_named_with_its_commit(
    document: dict[str, Any], tmp_path: Path
) -> None:
    document["model"] |= {"name": "Qwen/Qwen3-0.6B", "source": "hub", "revision": "c0ffee" * 6}
    card = card_of(document, {"license": "apache-2.0", "base_model": "Qwen/Qwen3-0.6B-Base"})
    assert metadata_of(card, tmp_path)["base_model"] == "Qwen/Qwen3-0.6B"
    assert f"Qwen/Qwen3-0.6B, commit `{'c0ffee' * 6}`" in card


def test_scores_errors_data_and_recipe_are_those_of_the_run(document: dict[str, Any]) -> None:
    document["eval"]["small"]["fused"] |= {"mean": 0.875, "low": 0.7194, "high": 0.9615, "n": 27}
    card = card_of(document)
    assert "| small | fused | 0.88 | 0.72 to 0.96 | 27 |" in card
    for column in ("base", "adapter", "quantized (this model)"):
        assert f"| small | {column} | " in card
    for check in document["export"]["checks"]:
        assert check["measured"].split(",")[0] in card
    for split in ("train", "valid"):
        facts = document["data"]["splits"][split]
        assert f"| {split} | {facts['rows']} |" in card
        assert facts["sources"][0]["sha256"] in card
    recipe = json.loads(card.split("```json\n")[1].split("```")[0])
    assert recipe["train"]["learning_rate"] == 3e-3
    assert recipe["export"]["q_group_size"] == 32
    assert "enable_thinking=False" in card and 'load("me/tiny-model")' in card
    assert "| small | fused (this model) |" in card_of(document, column="fused")


def test_nothing_measured_is_said(document: dict[str, Any]) -> None:
    document["eval"] = {}
    assert "No evaluation suite was measured." in card_of(document)


def test_no_path_and_no_credential_of_this_machine(
    document: dict[str, Any], finished_once: Path
) -> None:
    secret = "hf_" + "a" * 30
    values = document["recipe"]["values"]
    values["model"] = "/home/somebody/models/base"
    values["data"]["path"] = "../private/rows"
    values["data"]["tool_api"] = "~somebody/api.yaml"
    values["eval"]["suites"] = ["C:\\Users\\somebody\\suite.yaml"]
    values["optimizer"] = secret
    document["data"]["splits"]["train"]["sources"][0]["path"] = "/home/somebody/rows.jsonl"
    assert str(finished_once) in json.dumps(document), "the document has paths"
    card = card_of(document)
    for private in ("somebody", "private", str(finished_once), str(Path.home()), secret, "/tmp"):
        assert private not in card, private
    assert "rows.jsonl" in card and '"suite.yaml"' in card


def test_what_a_file_says_cannot_break_the_page(document: dict[str, Any], tmp_path: Path) -> None:
    document["eval"] = {"a | b\n<script>\x1b[2J": {"base": {"mean": 1.0, "n": 1}}}
    document["recipe"]["values"]["name"] = "```\n# not a heading"
    hostile = {"license": 'mit"\nlibrary_name: evil', "base_model": "a/b\nlicense: mit"}
    card = card_of(document, hostile)
    found = metadata_of(card, tmp_path)
    assert found["library_name"] == "mlx" and "base_model" not in found
    assert "<script" not in card and "\x1b" not in card
    assert card.count("```") == 4 and "\n# not a heading" not in card
    rows = [line for line in card.splitlines() if line.startswith("| a ")]
    assert len(rows) == 1 and rows[0].replace("\\|", "").count("|") == 6


def test_values_that_only_look_like_paths_stay() -> None:
    assert public_value({"regex": "/etc/.*", "path": "/etc/x", "none": None, "list": ["a/b"]}) == {
        "regex": "/etc/.*",
        "path": "x",
        "list": ["a/b"],
    }


def test_the_same_document_gives_the_same_card(document: dict[str, Any]) -> None:
    before = json.dumps(document)
    assert card_of(document) == card_of(document)
    assert json.dumps(document) == before


def test_how_the_weights_were_chosen_is_said_where_they_were(document: dict[str, Any]) -> None:
    assert "weights taken" not in card_of(document) and "| seeds" not in card_of(document)
    document["recipe"]["values"]["train"]["select"]["metric"] = "validation_loss"
    document["train"]["info"]["seeds"] = {
        "chosen": 3,
        "trained": [{"seed": 3}, {"seed": 4}],
        "spread": {"measure": "validation_loss", "mean": 1.5, "low": 1.25, "high": 1.75},
        "reached": None,
    }
    card = card_of(document)
    last = document["train"]["info"]["iterations"]
    assert f"| weights taken | iteration {last} of {last} (validation loss" in card
    assert "| seeds | 2 trained, 3 chosen; validation loss 1.25 to 1.75, mean 1.5 |" in card


def test_what_survived_is_on_the_card(document: dict[str, Any]) -> None:
    document["survival"]["model"]["ways"]["quantized"]["survival"] = 0.9512
    document["survival"] |= {"survival": 0.9512, "min_survival": 0.9}
    card = card_of(document)
    assert "(this model) | 95.1 % |" in card and "Warnings: none." in card
    document["survival"] |= {"survival": 0.4, "min_survival": None}
    assert "keeps 40.0 % of what training changed" in card_of(document)
    document["survival"] = document["export"]["fused"] = None
    assert "was not measured" in card_of(document)
