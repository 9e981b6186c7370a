"""What a token keeps in a trained layer on a GPU is what the memory forecast counts, in 16 bits."""

import gc
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_ft.data.tokens import pack_rows
from mlx_ft.engine.device import AS_GPU
from mlx_ft.recipe.schema import TrainRecipe
from mlx_ft.train.accumulation import GradientWindow, StepForm, build_optimizer
from mlx_ft.train.adapters import put_adapter
from mlx_ft.train.numerics.batch import make_batch
from mlx_ft.train.numerics.forward import SplitForward
from mlx_ft.train.numerics.losses import cross_entropy_sum
from tests.support.gpu_memory import kept_as_on_metal
from tests.support.models import TINY_CONFIGS, random_model
from tests.support.slow import fast_first

HIDDEN, INNER, QUERIES, KEYS = 192, 512, 256, 128
WIDTHS = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": QUERIES // 64,
    "num_key_value_heads": KEYS // 64,
    "head_dim": 64,
}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(AS_GPU, "1")
    mx.enable_compile()
    with kept_as_on_metal():
        yield
    mx.disable_compile()


def peak_bytes(model: nn.Module, layers: int, tokens: int, dtype: mx.Dtype) -> int:
    """Return the memory of one gradient with `layers` adapted layers, beyond what was held."""
    train = TrainRecipe(num_layers=layers, iters=1)
    lora = {"rank": 2, "scale": 2.0, "dropout": 0.0}
    put_adapter(
        model, train, {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": lora}
    )
    model.train()
    forward = SplitForward(model, len(model.layers) - layers)
    forward.packs = True
    forward.dtype = dtype
    trained = np.zeros(tokens + 1, np.uint8)
    trained[-8:] = 1
    rows = pack_rows([(np.arange(3, tokens + 4, dtype=np.int32) % 300, trained)], [1])
    batch = make_batch(rows, (0,), 0)
    prefix = mx.random.normal((*batch.ids.shape, HIDDEN)).astype(dtype)
    window = GradientWindow(
        model,
        lambda batch, prefix: cross_entropy_sum(forward, batch, prefix),
        build_optimizer(train),
        None,
        StepForm.of(train, forward),
    )
    mx.eval(model.parameters(), prefix, batch.arrays, window._weights.read())
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(window.gradient(batch, prefix))
    return int(mx.get_peak_memory()) - held


@pytest.mark.parametrize("base_type", fast_first(["bfloat16", "4-bit"]))
def test_a_layer_keeps_what_the_forecast_counts(base_type: str) -> None:
    """Twice the stream and its norms, gate, up and product, queries, outputs, keys and values."""
    peaks = {}
    for layers in (1, 5):
        for tokens in (63, 191):  # a CPU's attention grows with their square
            config = TINY_CONFIGS["llama"] | WIDTHS | {"num_hidden_layers": 6}
            model = random_model(config)
            model.update(tree_map(lambda a: a.astype(mx.bfloat16), model.parameters()))
            if base_type == "4-bit":
                nn.quantize(model, 64, 4)
            model.freeze()
            mx.eval(model.parameters())
            gc.collect()
            mx.clear_cache()
            peaks[layers, tokens] = peak_bytes(model, layers, tokens, mx.bfloat16)
    more = (peaks[5, 191] - peaks[5, 63]) - (peaks[1, 191] - peaks[1, 63])
    kept = more / (4 * 128)
    counted = 2 * (4 * HIDDEN + 3 * INNER + 2 * QUERIES + 2 * KEYS)
    assert kept == pytest.approx(counted, rel=0.15)
