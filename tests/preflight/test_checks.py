"""For each check a run that passes and one that does not; failures say what would pass."""

import json
from dataclasses import replace
from typing import Any, get_args

import pytest

from mlx_ft.errors import RecipeError
from mlx_ft.model.shapes import model_shape
from mlx_ft.preflight.checks import CHECKS, MAX_PARAMETERS_PER_ROW, base_health, run_checks
from mlx_ft.preflight.findings import (
    Finding,
    OriginalFacts,
    PreflightInput,
    findings_json,
    raise_on_fail,
)
from mlx_ft.preflight.forecast import (
    disk_forecast,
    parameters_from_file,
    run_updates,
    trainable_parameters,
)
from mlx_ft.recipe.preflight import AcceptableCheck
from mlx_ft.recipe.schema import ExportRecipe, TrainRecipe
from tests.support.preflight_inputs import (
    MACHINE,
    SMOLLM2_135M,
    finding_of,
    quickstart,
    stats_of,
    with_recipe,
)

QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": False,
}
SEVEN_MODULES = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


def collapsed_run() -> PreflightInput:
    lora = {"rank": 64, "alpha": 128, "keys": SEVEN_MODULES}
    facts = quickstart(model_config=QWEN3_8B, data_stats=stats_of(568))
    return with_recipe(facts, "train", num_layers=-1, lora_parameters=lora)


def test_the_quickstart_has_nothing_to_complain_of() -> None:
    findings = run_checks(quickstart())
    assert [finding.check for finding in findings if finding.level != "ok"] == []
    assert all(finding.measured and finding.limit and not finding.fix for finding in findings)
    raise_on_fail(findings)


def test_every_check_has_its_own_name() -> None:
    names = [finding.check for finding in run_checks(quickstart())]
    assert len(set(names)) == len(CHECKS)
    assert names == [check.__name__ for check in CHECKS]


def test_findings_are_json() -> None:
    value = findings_json(run_checks(collapsed_run()))
    assert json.loads(json.dumps(value)) == value
    assert value["schema"] == 1
    for finding in value["findings"]:
        assert set(finding) == {"check", "level", "measured", "limit", "fix"}


def test_the_run_that_collapsed_is_stopped_with_its_figures() -> None:
    finding = finding_of("capacity", collapsed_run())
    assert finding.level == "fail"
    # 36 layers x 64 x (inputs + outputs of the seven matrices), to 568 rows
    assert "174,587,904 trainable parameters for 568 rows, 307,373 a row" in finding.measured
    assert "6.1 times too many" in finding.measured
    assert finding.limit == "50,000 trainable parameters a row"
    assert "rank 10" in finding.fix
    assert "num_layers 5" in finding.fix
    assert "3,492 rows" in finding.fix


def test_what_capacity_advises_passes_and_a_little_more_does_not() -> None:
    facts = collapsed_run()
    train = facts.recipe.train

    def level(layers: int, rank: int, rows: int) -> str:
        lora = train.lora_parameters.model_dump() | {"rank": rank}
        changed = with_recipe(facts, "train", num_layers=layers, lora_parameters=lora)
        return finding_of("capacity", replace(changed, data_stats=stats_of(rows))).level

    assert [level(-1, 10, 568), level(-1, 11, 568)] == ["ok", "fail"]
    assert [level(5, 64, 568), level(6, 64, 568)] == ["ok", "fail"]
    assert [level(-1, 64, 3_492), level(-1, 64, 3_491)] == ["ok", "fail"]


def test_a_handful_of_rows_is_told_how_many_it_takes() -> None:
    lora = {"rank": 1, "alpha": 2, "keys": SEVEN_MODULES}
    facts = with_recipe(collapsed_run(), "train", lora_parameters=lora)
    finding = finding_of("capacity", replace(facts, data_stats=stats_of(1)))
    assert finding.level == "fail"
    assert "rank" not in finding.fix and "55 rows" in finding.fix


@pytest.mark.parametrize(
    ("check", "section", "values", "said"),
    [
        ("num_layers", "train", {"num_layers": 31}, "at most 30, or -1"),
        ("batch_size", "train", {"batch_size": 426}, "at most 425"),
        (
            "lora_keys",
            "train",
            {"lora_parameters": {"keys": ["self_attn.q_porj", "mlp.up_proj"], "scale": 2.0}},
            "did you mean self_attn.q_proj? ",
        ),
        ("schedule", "train", {"lr_schedule": {"warmup_steps": 107}}, "shorten the schedule"),
        ("schedule", "train", {"lr_schedule": {"warmup_ratio": 0.999}}, "shorten the schedule"),
        (
            "schedule",
            "train",
            {"lr_schedule": {"name": "linear", "warmup_steps": 7, "decay_steps": 101}},
            "shorten the schedule",
        ),
    ],
)
def test_recipes_that_do_not_fit_fail(
    check: str, section: str, values: dict[str, Any], said: str
) -> None:
    finding = finding_of(check, with_recipe(quickstart(), section, **values))
    assert finding.level == "fail"
    assert said in finding.fix


@pytest.mark.parametrize(
    ("check", "values"),
    [
        ("num_layers", {"num_layers": 30}),
        ("num_layers", {"num_layers": -1}),
        ("batch_size", {"batch_size": 425}),
        ("lora_keys", {"lora_parameters": {"keys": ["mlp.up_proj"], "scale": 2.0}}),
        ("schedule", {"lr_schedule": {"warmup_steps": 106}}),
        ("schedule", {"lr_schedule": {"name": "linear", "warmup_steps": 7, "decay_steps": 100}}),
    ],
)
def test_recipes_that_just_fit_pass(check: str, values: dict[str, Any]) -> None:
    assert finding_of(check, with_recipe(quickstart(), "train", **values)).level == "ok"


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_a_warm_up_given_as_a_share_is_told_in_updates(name: str) -> None:
    def measured(**given: float) -> str:
        facts = with_recipe(quickstart(), "train", lr_schedule={"name": name, **given})
        assert "107 optimizer updates" in finding_of("schedule", facts).limit
        return finding_of("schedule", facts).measured

    assert measured(warmup_ratio=0.1) == measured(warmup_steps=11) == "11 updates of warm-up"
    assert measured() == "0 updates of warm-up"


def test_an_unfinished_schedule_may_be_allowed() -> None:
    schedule = {"name": "linear", "decay_steps": 1000, "allow_unfinished": True}
    facts = with_recipe(quickstart(), "train", lr_schedule=schedule)
    assert finding_of("schedule", facts).level == "warn"


def test_a_run_whose_only_update_changes_nothing_fails_whatever_is_allowed() -> None:
    schedule = {"name": "cosine", "warmup_ratio": 0.1, "allow_unfinished": True}
    one = {"batch_size": 425, "epochs": 1}
    finding = finding_of(
        "schedule", with_recipe(quickstart(), "train", lr_schedule=schedule, **one)
    )
    assert finding.level == "fail" and "only update has learning rate 0" in finding.measured
    begun = schedule | {"warmup_init": 1e-6}
    facts = with_recipe(quickstart(), "train", lr_schedule=begun, **one)
    assert finding_of("schedule", facts).level == "warn"


def test_a_key_that_only_untouched_layers_have_fails() -> None:
    experts = {
        **{key: value for key, value in QWEN3_8B.items() if key != "model_type"},
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(30)),
    }
    facts = with_recipe(
        quickstart(model_config=experts),
        "train",
        num_layers=4,
        lora_parameters={"keys": ["mlp.up_proj"], "scale": 2.0},
    )
    assert finding_of("lora_keys", facts).level == "fail"


@pytest.mark.parametrize(
    ("check", "train", "level"),
    [
        ("stop_token", {"stop_trained_rows": 424}, "warn"),
        ("stop_token", {"stop_trained_rows": 0}, "fail"),
        ("thinking", {"thinking_rows": 3}, "warn"),
        ("tools", {"toolless_rows": 3}, "warn"),
    ],
)
def test_rows_that_teach_something_else(check: str, train: dict[str, int], level: str) -> None:
    assert finding_of(check, quickstart(data_stats=stats_of(**train))).level == level


def test_thinking_without_thoughts_warns_and_with_them_passes() -> None:
    facts = with_recipe(quickstart(), "chat", enable_thinking=True)
    assert finding_of("thinking", facts).level == "warn"
    thinking = replace(facts, data_stats=stats_of(thinking_rows=400))
    assert finding_of("thinking", thinking).level == "ok"


@pytest.mark.parametrize(("rows", "level"), [(0, "fail"), (9, "warn"), (10, "ok")])
def test_validation_rows(rows: int, level: str) -> None:
    stats = stats_of()
    stats["splits"]["valid"]["rows"] = rows
    assert finding_of("validation", quickstart(data_stats=stats)).level == level


def test_overlap_names_the_lines() -> None:
    stats = stats_of() | {"overlap_rows": 2, "overlap_lines": [[3, 7], [9, 8]]}
    finding = finding_of("overlap", quickstart(data_stats=stats))
    assert finding.level == "warn"
    assert finding.fix.endswith("7, 8")


def test_coverage_advises_the_shortest_length_that_is_enough() -> None:
    shares = {"256": 0.5, "512": 0.9, "1024": 0.964, "2048": 1.0, "4096": 1.0}
    finding = finding_of("coverage", quickstart(data_stats=stats_of() | {"coverage": shares}))
    assert finding.level == "warn"
    assert "1,024: 96.4%" in finding.measured
    assert "max_seq_length to 1024" in finding.fix


def test_coverage_beyond_the_round_lengths_advises_the_longest_row() -> None:
    stats = stats_of() | {"coverage": {"512": 0.1, "4096": 0.5}}
    finding = finding_of("coverage", quickstart(data_stats=stats))
    assert "max_seq_length to 205" in finding.fix


@pytest.mark.parametrize("system", ["Linux", "Darwin"])
def test_memory_only_ever_warns_and_says_that_it_is_a_forecast(system: str) -> None:
    small = replace(MACHINE, system=system, memory_bytes=10**6)
    finding = finding_of("memory", quickstart(machine=small))
    assert finding.level == "warn"
    assert "by forecast" in finding.measured
    assert finding_of("memory", quickstart(machine=replace(MACHINE, system=system))).level == "ok"


@pytest.mark.parametrize("memory_bytes", [10**6, 24 * 10**9])
def test_memory_says_that_asking_during_training_comes_on_top(memory_bytes: int) -> None:
    facts = quickstart(machine=replace(MACHINE, memory_bytes=memory_bytes))
    asked = with_recipe(facts, "train", select={"suite": "evals/small.yaml"})
    by_loss = with_recipe(facts, "train", select={"metric": "validation_loss"})
    assert "(train.select) comes on top" in finding_of("memory", asked).measured
    for silent in (facts, by_loss):
        assert "on top" not in finding_of("memory", silent).measured


def test_disk_fails_when_it_is_too_little_and_warns_when_it_is_tight() -> None:
    facts = quickstart()
    shape = model_shape(facts.model_config)
    assert shape is not None
    trainable = trainable_parameters(shape, facts.recipe.train)
    need = disk_forecast(shape.parameters, trainable, facts.recipe.train, facts.recipe.export, True)
    for free, level in ((need.total_bytes - 1, "fail"), (need.total_bytes, "warn"), (10**12, "ok")):
        assert finding_of("disk", quickstart(free_disk_bytes=free)).level == level


def test_layers_that_stay_16_bit_are_counted_and_none_quantized_fails() -> None:
    """A hidden size of 576 is not whole groups of 128: only what reads the 1,536 within is."""
    facts = quickstart()
    assert finding_of("q_group_size", facts).level == "ok"
    wide = with_recipe(facts, "export", q_group_size=128)
    some = finding_of("q_group_size", wide)
    assert some.level == "warn" and some.fix == "set export.q_group_size: 64"
    assert "181 of 211 layers stay 16-bit" in some.measured
    assert "self_attn.q_proj" in some.measured and "rows of 576" in some.measured
    none = replace(wide, model_config=SMOLLM2_135M | {"intermediate_size": 1500})
    assert finding_of("q_group_size", none).level == "fail"


def test_what_stays_16_bit_takes_16_bits_on_the_disk() -> None:
    def quantized(half: int) -> int:
        train, export = TrainRecipe(), ExportRecipe()
        return disk_forecast(10**9, 0, train, export, False, half).quantized_bytes

    assert quantized(10**9) == 2 * 10**9
    assert quantized(0) < quantized(10**8) < quantized(10**9)
    wide = with_recipe(quickstart(), "export", q_group_size=128)
    assert finding_of("disk", wide).measured != finding_of("disk", quickstart()).measured


def test_an_unknown_architecture_is_a_warning_never_a_guess() -> None:
    facts = quickstart(model_config={"model_type": "mamba", "num_hidden_layers": 30})
    levels = {finding.check: finding.level for finding in run_checks(facts)}
    for check in ("capacity", "lora_keys", "memory"):
        assert levels[check] == "warn"
        assert "not computed" in finding_of(check, facts).measured
    assert levels["num_layers"] == levels["disk"] == "ok"
    assert finding_of("num_layers", quickstart(model_config={"model_type": "x"})).level == "warn"


def test_all_failures_are_raised_at_once_and_warnings_are_not() -> None:
    values = {"num_layers": 31, "batch_size": 500, "grad_accumulation_steps": 1}
    facts = with_recipe(quickstart(), "train", **values)
    with pytest.raises(RecipeError) as error:
        raise_on_fail(run_checks(facts))
    assert error.value.exit_code == 2
    where = [fault.where for fault in error.value.faults]
    assert where == ["check num_layers", "check batch_size"]
    raise_on_fail([Finding("memory", "warn", "much", "less", "buy more")])


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "updates"), [(425, 4, 2, 107), (1, 4, 2, 1), (8, 4, 1, 4)]
)
def test_partial_batches_and_accumulations_count(
    rows: int, batch: int, accumulation: int, updates: int
) -> None:
    train = TrainRecipe(batch_size=batch, grad_accumulation_steps=accumulation, epochs=2)
    assert run_updates(train, rows) == updates


def test_iterations_given_do_not_depend_on_rows() -> None:
    train = TrainRecipe(iters=10, grad_accumulation_steps=4)
    assert {run_updates(train, rows) for rows in (1, 100)} == {3}


def test_the_forecast_of_a_known_size() -> None:
    # 10^9 parameters: 2 bytes each fused; 5 bits and 32 bits to 64 of them quantized
    need = disk_forecast(10**9, 0, TrainRecipe(), ExportRecipe(), True)
    assert need.fused_bytes == 2 * 10**9
    assert need.quantized_bytes == 687_500_000
    assert need.train_bytes == 0


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({"quantization": {"bits": 4, "group_size": 32}}, 1_600),
        ({"torch_dtype": "bfloat16"}, 500),
        ({"dtype": "float32"}, 250),
        ({}, 500),
    ],
)
def test_parameters_from_a_files_size(config: dict[str, Any], parameters: int) -> None:
    assert parameters_from_file(config, 1_000) == parameters


def hit(rule: str, severity: str) -> dict[str, Any]:
    lines = list(range(3, 12))
    text = {"found": f"{rule} found", "fix": f"mend {rule}"}
    return {"rule": rule, "severity": severity, "count": 9, "rows": 425, "lines": lines, **text}


def test_lint_is_told_with_lines_and_stops_when_it_is_serious() -> None:
    facts = quickstart(data_stats=stats_of() | {"lint": [hit("cut-answers", "warn")]})
    found = finding_of("lint", facts)
    assert found.level == "warn" and "cut-answers: 9 cut-answers found" in found.measured
    assert "cut-answers (line 3, 4, 5, 6, 7, ...): mend cut-answers" in found.fix
    both = [hit("cut-answers", "warn"), hit("secrets", "fail")]
    assert finding_of("lint", quickstart(data_stats=stats_of() | {"lint": both})).level == "fail"


def test_prompts_that_are_trained_are_named() -> None:
    found = (("talk/greeting-01", 3, True), ("code/7", 9, False))
    finding = finding_of("contamination", quickstart(contaminated=found))
    assert finding.level == "warn" and "2 prompts" in finding.measured
    assert "1 of them whole" in finding.measured
    assert "talk/greeting-01 (line 3), code/7 (line 9)" in finding.fix


def test_a_rule_that_is_off_is_named_with_its_reason() -> None:
    facts = with_recipe(quickstart(), "data", lint_off={"duplicates": "repeated on purpose"})
    assert "duplicates off: repeated on purpose" in finding_of("lint", facts).limit


def test_files_are_named_as_they_are_called() -> None:
    stats = stats_of() | {"overlap_rows": 1, "overlap_lines": [[3, 7]]}
    stats["splits"]["valid"]["rows"] = 3
    for split, name in (("train", "train.parquet"), ("valid", "valid.csv")):
        stats["splits"][split]["sources"] = [{"path": f"data/{name}", "sha256": ""}]
    facts = quickstart(data_stats=stats, contaminated=(("code/7", 9, False),))
    assert "in train.parquet" in finding_of("contamination", facts).measured
    assert "lines of valid.csv: 7" in finding_of("overlap", facts).fix
    assert finding_of("validation", facts).fix == "hold out more rows into valid.csv"


def test_rows_that_are_held_out_are_in_the_training_file() -> None:
    stats = stats_of() | {"overlap_rows": 1, "overlap_lines": [[3, 7]]}
    stats["splits"]["valid"] |= {"rows": 3, "sources": stats["splits"]["train"]["sources"]}
    facts = with_recipe(quickstart(data_stats=stats), "data", holdout=0.1)
    assert "lines of train.jsonl: 7" in finding_of("overlap", facts).fix
    assert finding_of("validation", facts).fix == "raise data.holdout, or add rows"


def test_the_limit_is_the_documented_one() -> None:
    assert MAX_PARAMETERS_PER_ROW == 50_000


@pytest.mark.parametrize(
    ("tuned", "probed", "level"),
    [
        (None, False, "ok"),
        ("llama", False, "ok"),
        ("qwen3", False, "fail"),
        ("qwen3", True, "warn"),
    ],
)
def test_values_of_another_family_stop_until_somebody_has_looked(
    tuned: str | None, probed: bool, level: str
) -> None:
    facts = with_recipe(quickstart(probed=probed), "preflight", family=tuned)
    finding = finding_of("family", facts)
    assert finding.level == level
    if level == "fail":
        assert "mlx-ft probe smollm2-135m-instruct" in finding.fix


def test_marks_that_the_tokenizer_takes_apart_stop() -> None:
    assert finding_of("single_tokens", quickstart()).level == "ok"
    facts = quickstart(token_counts=(("<tool_call>", 1), ("<think>", 3)))
    finding = finding_of("single_tokens", facts)
    assert finding.level == "fail" and finding.measured == "<think> is 3 tokens"
    assert finding_of("single_tokens", quickstart(token_counts=(("<a>", 1),))).level == "ok"


def test_a_failure_that_the_recipe_accepts_is_a_warning_with_its_reason() -> None:
    values = {"family": "qwen3", "accept": {"family": "the shapes are alike"}}
    facts = with_recipe(quickstart(), "preflight", **values)
    (finding,) = [f for f in run_checks(facts) if f.check == "family"]
    assert finding.level == "warn" and finding.fix == "accepted: the shapes are alike"
    raise_on_fail(run_checks(facts))


def test_every_check_that_a_recipe_may_accept_is_a_check() -> None:
    names = {finding.check for finding in run_checks(quickstart())}
    names.add(base_health(1, [], {}).check)
    assert set(get_args(AcceptableCheck)) <= names


def test_a_check_is_called_as_its_finding() -> None:
    facts = quickstart()
    assert [check(facts).check for check in CHECKS] == [check.__name__ for check in CHECKS]


@pytest.mark.parametrize(("bad", "level"), [(0, "ok"), (1, "warn"), (3, "warn"), (4, "fail")])
def test_a_base_model_that_loops_is_stopped_before_it_is_trained(bad: int, level: str) -> None:
    looping = [(f"prompt-{number}", "the same word again") for number in range(bad)]
    finding = base_health(10, looping, {})
    assert finding.level == level
    assert ("prompt-0: the same word again" in finding.fix) == bool(bad)
    assert base_health(10, looping, {"base_health": "known"}).level != "fail"


def test_a_model_that_cannot_become_a_gguf_file_is_refused_before_training() -> None:
    llama = {**SMOLLM2_135M, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
    granite = {**llama, "model_type": "granite"}
    assert finding_of("gguf", quickstart(model_config=granite)).level == "ok", "none is asked for"
    asked = with_recipe(quickstart(), "export", gguf="q8_0")
    assert finding_of("gguf", replace(asked, model_config=llama)).level == "ok"
    finding = finding_of("gguf", replace(asked, model_config=granite))
    assert finding.level == "fail" and "granite" in finding.measured


def original_facts(**changes: Any) -> OriginalFacts:
    shapes = {"model.embed_tokens.weight": (49_152, 576), "model.norm.weight": (576,)}
    config = {k: v for k, v in SMOLLM2_135M.items() if k != "quantization"}
    return replace(OriginalFacts(config, shapes, dict(shapes)), **changes)


def test_an_original_of_the_same_shapes_passes() -> None:
    finding = finding_of("export_base", replace(quickstart(), original=original_facts()))
    assert finding.level == "ok" and "2 tensors" in finding.measured
    assert finding_of("export_base", quickstart()).level == "ok"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"config": SMOLLM2_135M | {"hidden_size": 960}}, "hidden_size is 960, trained with 576"),
        ({"config": SMOLLM2_135M | {"model_type": "qwen3"}}, "model_type is qwen3"),
        ({"shapes": {"model.norm.weight": (960,)}}, "model.norm.weight is (960,)"),
        ({"chat_differences": ("chat fingerprint, template: other",)}, "template: other"),
    ],
)
def test_another_model_is_no_original(changes: dict[str, Any], found: str) -> None:
    finding = finding_of("export_base", replace(quickstart(), original=original_facts(**changes)))
    assert finding.level == "fail" and found in finding.measured and finding.fix


def test_a_quantized_original_is_a_warning() -> None:
    quantized = replace(quickstart(), original=original_facts(config=SMOLLM2_135M))
    assert finding_of("export_base", quantized).level == "warn"
