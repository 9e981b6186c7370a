"""Peak memory of one training step of a 3B-shaped model by mlx_lm's loss and by mlx-ft.

A random Llama-3.2-3B-shaped model in 4 bits, its top layers adapted, one row. mlx_lm.lora's step is
made of its own parts (linear_to_lora_layers, default_loss, Adam); mlx-ft's is a run of one
iteration with `train.low_memory`, start-up proofs, frozen layers and validation of the same row
included.

Usage: python -m tests.benchmarks.step_memory [--layers 12] [--tokens 128] [--engine mlx_lm|mlx-ft]
       [--grad-checkpoint]
"""

import argparse
import io
import resource
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import mlx_ft  # noqa: F401  # first: it loads OpenBLAS before mlx is imported
from tests.benchmarks.shapes import LLAMA_3B, write_random_quantized

RANK, SCALE, LEARNING_RATE = 8, 8.0, 1e-4


def one_row(tokens: int) -> list[int]:
    """Return ids of a row with so many positions that predict."""
    return [int(token) for token in np.random.default_rng(0).integers(3, 300, tokens + 1)]


def theirs(folder: Path, layers: int, tokens: int, checkpoint: bool) -> None:
    """One step as mlx_lm.lora makes it, validation and saving left out."""
    import mlx.optimizers as optimizers
    from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.freeze()
    linear_to_lora_layers(model, layers, {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    if checkpoint:
        grad_checkpoint(model.layers[0])
    model.train()
    optimizer = optimizers.Adam(learning_rate=LEARNING_RATE)
    batch = mx.array([one_row(tokens)])
    lengths = mx.array([[tokens // 2, tokens + 1]])
    loss_and_gradient = nn.value_and_grad(model, default_loss)
    (loss, count), gradient = loss_and_gradient(model, batch, lengths)
    optimizer.update(model, gradient)
    mx.eval(model.state, optimizer.state, loss, count)
    print(f"loss {loss.item():.4f}")


def ours(folder: Path, layers: int, tokens: int, work: Path, checkpoint: bool) -> None:
    """One iteration of mlx-ft's loop, from load to result."""
    from mlx_ft.data.tokens import pack_rows, write_split
    from mlx_ft.recipe.schema import DataRecipe, LoraParameters, Recipe, TrainRecipe
    from mlx_ft.system.console import Console
    from mlx_ft.train.handoff import TrainRequest
    from mlx_ft.train.session import train_with_progress
    from mlx_ft.train.setup import Setup

    trained = np.zeros(tokens + 1, np.uint8)
    trained[tokens // 2 :] = 1
    rows = pack_rows([(np.array(one_row(tokens), np.int32), trained)], [1])
    data, target = work / "data", work / f"train-{time.time_ns()}"
    data.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True)
    for name in ("train", "valid"):
        write_split(data / f"{name}.safetensors", rows)
    train = TrainRecipe(
        num_layers=layers,
        lora_parameters=LoraParameters(rank=RANK, scale=SCALE),
        batch_size=1,
        iters=1,
        learning_rate=LEARNING_RATE,
        low_memory=True,
        grad_checkpoint=checkpoint,
        prefix_cache="memory",
    )
    recipe = Recipe(name="step", model="random", data=DataRecipe(path="."), train=train)
    request = TrainRequest(recipe, folder, data, target, "i", "random", 1 << 30, target, ())
    inputs = Setup(request).inputs(request)
    print(inputs.forward.note)
    result = train_with_progress(inputs, Console(io.StringIO()))
    print(
        f"validation loss before {result.first_validation_loss:.4f}, after "
        f"{result.final_validation_loss:.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--engine", choices=["mlx_lm", "mlx-ft"], required=True)
    parser.add_argument("--grad-checkpoint", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("bench-memory"))
    arguments = parser.parse_args()
    folder = arguments.work / "model-3b"
    if not (folder / "config.json").exists():
        # The type that a CPU is fast with: with scales in bfloat16 mlx_lm's step takes hours.
        write_random_quantized(folder, LLAMA_3B, mx.float32)
        sys.exit("the model is written; run again, so that writing it is not measured")
    started = time.perf_counter()
    mx.reset_peak_memory()
    if arguments.engine == "mlx_lm":
        theirs(folder, arguments.layers, arguments.tokens, arguments.grad_checkpoint)
    else:
        ours(folder, arguments.layers, arguments.tokens, arguments.work, arguments.grad_checkpoint)
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(
        f"{arguments.engine}: peak {mx.get_peak_memory() / 1e9:.3f} GB of arrays, "
        f"{resident / 1e9:.3f} GB resident, {time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
