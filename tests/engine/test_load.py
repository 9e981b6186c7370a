"""Generation in batches says what generation one by one says, and adapters fit entirely or not."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import generate as mlx_lm_generate
from mlx_lm import load as mlx_lm_load

from mlx_ft.engine.adapters import adapter_faults
from mlx_ft.engine.device import on_cpu
from mlx_ft.engine.generate import generate
from mlx_ft.engine.load import LoadedModel, load_model, load_weights
from mlx_ft.errors import ModelError
from mlx_ft.model.chat import ChatFormat
from tests.support.models import stored_arrays, write_tiny_model

QUESTIONS = ("hello", "what is the capital of France?", "talk about files, tests and tools", "x")


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder, ChatFormat())


def prompts_of(loaded: LoadedModel) -> list[list[int]]:
    return [loaded.renderer.prompt_ids([{"role": "user", "content": text}]) for text in QUESTIONS]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_batched_generation_is_one_by_one(loaded: LoadedModel, batch_size: int) -> None:
    prompts = prompts_of(loaded)
    alone = [generate(loaded, [p], max_tokens=10, batch_size=1)[0] for p in prompts]
    seen: list[int] = []
    together = generate(
        loaded,
        prompts,
        max_tokens=10,
        batch_size=batch_size,
        on_done=lambda index, generation: seen.append(index),
    )
    assert [g.ids for g in together] == [g.ids for g in alone]
    assert sorted(seen) == [0, 1, 2, 3]


def test_generation_is_that_of_mlx_lm(folder: Path, loaded: LoadedModel) -> None:
    model, tokenizer = mlx_lm_load(str(folder))
    for prompt, ours in zip(
        prompts_of(loaded), generate(loaded, prompts_of(loaded), max_tokens=8), strict=True
    ):
        theirs = mlx_lm_generate(model, tokenizer, prompt, max_tokens=8)
        assert theirs == loaded.renderer.decode_raw(ours.ids)


def test_every_stop_token_ends_an_answer_and_is_not_part_of_it(loaded: LoadedModel) -> None:
    prompt = prompts_of(loaded)[0]
    free = generate(loaded, [prompt], max_tokens=6)[0]
    assert free.finish_reason == "length" and len(free.ids) == 6
    from dataclasses import replace

    renderer = load_model(Path(loaded.renderer.tokenizer.name_or_path), ChatFormat()).renderer
    renderer.stop_ids = frozenset({free.ids[2]})
    stopped = generate(replace(loaded, renderer=renderer), [prompt], max_tokens=6)[0]
    assert stopped.finish_reason == "stop"
    assert stopped.ids == free.ids[: free.ids.index(free.ids[2])]


def test_no_prompts_no_answers(loaded: LoadedModel) -> None:
    assert generate(loaded, [], max_tokens=4) == []


@pytest.mark.skipif(not on_cpu(), reason="float32 is how a CPU computes, not a GPU")
def test_a_cpu_holds_float32_with_the_numbers_of_the_file(folder: Path) -> None:
    model, _, compute = load_weights(folder)
    assert "float32" in compute
    dtypes = {array.dtype for _, array in tree_flatten(model.parameters())}
    assert dtypes == {mx.float32}
    stored = stored_arrays(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    weight, scales, biases = (stored[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
    expected = mx.dequantize(weight, scales, biases, 32, 4)
    assert mx.array_equal(model.model.layers[0].mlp.up_proj.weight, expected.astype(mx.float32))


def test_all_differences_of_an_adapter_are_named(tmp_path: Path) -> None:
    faults = adapter_faults(
        tmp_path,
        {"a.lora_a": (4, 2), "b.lora_a": (4, 2), "c.lora_a": (4, 2)},
        {"a.lora_a": (4, 2), "b.lora_a": (4, 3), "d.lora_a": (1, 1)},
    )
    text = "\n".join(map(str, faults))
    assert len(faults) == 3
    assert "c.lora_a: missing" in text and "d.lora_a: not a tensor" in text and "(4, 3)" in text


def test_one_difference_of_many_tensors_is_one_line(tmp_path: Path) -> None:
    names = [f"layers.{index}.lora_a" for index in range(28)]
    (fault,) = adapter_faults(tmp_path, dict.fromkeys(names, (4, 2)), dict.fromkeys(names, (4, 3)))
    assert "layers.0.lora_a: shape (4, 3)" in str(fault) and "and 27 more like it" in str(fault)


def test_an_unknown_architecture_is_the_users_to_change(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    config = (folder / "config.json").read_text().replace('"llama"', '"no_such_model"')
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match="mlx-lm cannot load it"):
        load_weights(folder)


def test_a_config_without_a_size_is_the_users_to_change(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="hidden_size"):
        load_weights(folder)


def test_torn_weights_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match="mlx-lm cannot load it"):
        load_weights(folder)
