"""The list of checks, in CHECKS: each a small pure function from facts to one finding.

Does not: load weights, change the recipe, or stop a run (`raise_on_fail` does).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_ft.model.gguf_support import gguf_fault
from mlx_ft.model.shapes import ModelShape, model_shape
from mlx_ft.preflight.adapter_start import resume_adapter_file
from mlx_ft.preflight.findings import Finding, Level, PreflightInput, accepted, passes
from mlx_ft.preflight.fit import changes_that_fit, forecast, usable_here
from mlx_ft.preflight.forecast import (
    adapted_modules,
    disk_forecast,
    parameters_from_file,
    run_updates,
    trainable_parameters,
)
from mlx_ft.preflight.original import export_base
from mlx_ft.preflight.quantization_groups import half_parameters, q_group_size
from mlx_ft.preflight.rows import (
    contamination,
    context,
    coverage,
    lint,
    overlap,
    replay,
    stop_token,
    thinking,
    tools,
    validation,
)
from mlx_ft.preflight.trainable import dora, quantized_base
from mlx_ft.recipe.export import fused_copy_needed_by
from mlx_ft.text.quantities import format_bytes

# A rule of thumb from a run that collapsed into one repeated word: rank 64 on all seven modules of
# an 8B model, with 568 rows, is about six times this.
MAX_PARAMETERS_PER_ROW = 50_000
TIGHT_DISK_SHARE = 0.9
# Small sound models loop now and then; a broken one does nothing else.
MAX_DEGENERATE_BASE = 0.3


def _not_computed(check: str, facts: PreflightInput, limit: str) -> Finding:
    name = facts.model_config.get("model_type", "unknown")
    measured = f"not computed: the layers of {name} models are not known here"
    return Finding(check, "warn", measured, limit, "look at the figures that training prints")


def capacity(facts: PreflightInput) -> Finding:
    """Trainable parameters a training row: with too many, the adapter learns rows by heart."""
    check, limit = "capacity", f"{MAX_PARAMETERS_PER_ROW:,} trainable parameters a row"
    shape, rows = model_shape(facts.model_config), facts.rows
    if shape is None:
        return _not_computed(check, facts, limit)
    trainable = trainable_parameters(shape, facts.recipe.train)
    each = trainable / max(rows, 1)
    measured = f"{trainable:,} trainable parameters for {rows:,} rows, {each:,.0f} a row"
    if each <= MAX_PARAMETERS_PER_ROW:
        return passes(check, measured, limit)
    measured += f", {each / MAX_PARAMETERS_PER_ROW:.1f} times too many"
    return Finding(check, "fail", measured, limit, _what_passes(facts, shape, trainable))


def _what_passes(facts: PreflightInput, shape: ModelShape, trainable: int) -> str:
    """Return the rank, the number of layers and the number of rows that would pass."""
    train = facts.recipe.train
    budget = MAX_PARAMETERS_PER_ROW * facts.rows
    rank = budget * train.lora_parameters.rank // trainable
    by_rank = rank and train.fine_tune_type != "full"
    ways = [f"train.lora_parameters.rank {rank}"] if by_rank else []
    layers = 0
    for count in range(1, len(shape.layers) + 1):
        fewer = train.model_copy(update={"num_layers": count})
        if trainable_parameters(shape, fewer) <= budget:
            layers = count
    if layers:
        ways.append(f"train.num_layers {layers}")
    ways.append(f"{-(-trainable // MAX_PARAMETERS_PER_ROW):,} rows")
    return f"any one of these passes: {', '.join(ways)}"


def num_layers(facts: PreflightInput) -> Finding:
    """More layers asked for than the model has."""
    check, wanted = "num_layers", facts.recipe.train.num_layers
    there = facts.model_config.get("num_hidden_layers")
    if not isinstance(there, int):
        return _not_computed(check, facts, "the model's layers")
    measured = "all layers" if wanted < 0 else f"the top {wanted} layers"
    limit = f"the model has {there} layers"
    if wanted <= there:
        return passes(check, measured, limit)
    fix = f"set train.num_layers to at most {there}, or -1 for all"
    return Finding(check, "fail", measured, limit, fix)


def lora_keys(facts: PreflightInput) -> Finding:
    """Names of modules that the model does not have, so that nothing would be trained there."""
    check, limit = "lora_keys", "every key names a module of the adapted layers"
    shape, train = model_shape(facts.model_config), facts.recipe.train
    if shape is None:
        return _not_computed(check, facts, limit)
    modules = adapted_modules(shape, train).values()
    keys = train.lora_parameters.keys
    if train.fine_tune_type == "full":
        return passes(check, "no adapter: every weight of these layers is trained", limit)
    if keys is None:
        return passes(check, f"all {len(modules)} linear layers", limit)
    found = {module.name for module in modules}
    unknown = [key for key in keys if key not in found]
    if not unknown:
        return passes(check, f"{len(modules)} modules of {len(found)} names", limit)
    names = sorted(shape.layer_names | shape.root_names)
    close = [difflib.get_close_matches(key, names, n=1) for key in unknown]
    meant = [match[0] for match in close if match]
    hint = f"did you mean {', '.join(meant)}? " if meant else ""
    measured = f"no module to adapt is called {', '.join(unknown)}"
    fix = f"{hint}this model has {', '.join(names)}"
    return Finding(check, "fail", measured, limit, fix)


def batch_size(facts: PreflightInput) -> Finding:
    """A mini-batch larger than the whole training set."""
    check, wanted = "batch_size", facts.recipe.train.batch_size
    measured, limit = f"{wanted} rows a mini-batch", f"{facts.rows:,} training rows"
    if wanted <= facts.rows:
        return passes(check, measured, limit)
    fix = f"set train.batch_size to at most {facts.rows}, or add rows"
    return Finding(check, "fail", measured, limit, fix)


def schedule(facts: PreflightInput) -> Finding:
    """A warm-up that the run never leaves, or a decay that it never ends."""
    check, shape = "schedule", facts.recipe.train.lr_schedule
    updates = run_updates(facts.recipe.train, facts.rows)
    warmup, decay = shape.warmup_updates(updates), shape.decay_steps
    measured = f"{warmup:,} updates of warm-up" + (f", {decay:,} of decay" if decay else "")
    limit = f"the run makes {updates:,} optimizer updates"
    # What follows the warm-up needs an update at least.
    if warmup + (decay or 1) <= updates:
        return passes(check, measured, limit)
    if warmup and updates == 1 and not shape.warmup_init:
        measured += ", so that the only update has learning rate 0"
        return Finding(check, "fail", measured, limit, "train longer, or without warm-up")
    level: Level = "warn" if shape.allow_unfinished else "fail"
    fix = "shorten the schedule or train longer; allow_unfinished: true lets the run end first"
    return Finding(check, level, measured, limit, fix)


def disk(facts: PreflightInput) -> Finding:
    """Room for adapter, checkpoints, the 16-bit model and the quantized model, all at once."""
    check, recipe = "disk", facts.recipe
    shape = model_shape(facts.model_config)
    if shape is None:
        trainable = half = 0
        parameters = parameters_from_file(facts.model_config, facts.model_bytes)
    else:
        trainable, parameters = trainable_parameters(shape, recipe.train), shape.parameters
        half = half_parameters(shape, recipe.export.q_group_size)
    fused = bool(fused_copy_needed_by(recipe.export, recipe.eval))
    need = disk_forecast(parameters, trainable, recipe.train, recipe.export, fused, half)
    free = facts.free_disk_bytes
    measured = (
        f"{format_bytes(need.total_bytes)}: "
        f"training {format_bytes(need.train_bytes) if shape else 'not computed'}, "
        f"16-bit model {format_bytes(need.fused_bytes)}, "
        f"{recipe.export.most_bits}-bit model {format_bytes(need.quantized_bytes)}"
    )
    limit = f"{format_bytes(free)} are free"
    if need.total_bytes <= free * TIGHT_DISK_SHARE:
        return passes(check, measured, limit)
    level: Level = "warn" if need.total_bytes <= free else "fail"
    return Finding(check, level, measured, limit, "free some space or choose another runs folder")


def memory(facts: PreflightInput) -> Finding:
    """The training's peak against this machine's memory; a forecast, and so never more than a
    warning.
    """
    check, there = "memory", facts.machine.memory_bytes
    usable = usable_here(facts.machine)
    limit = f"a training can use {format_bytes(usable)} of {format_bytes(there)} here"
    shape = model_shape(facts.model_config)
    if shape is None:
        return _not_computed(check, facts, limit)
    need = forecast(facts, shape, facts.recipe.train)
    measured = f"{format_bytes(need.peak_bytes)} at the peak of training, by forecast"
    if facts.recipe.train.select.asks:
        measured += "; asking prompts during training (train.select) comes on top"
    if need.peak_bytes <= usable:
        return passes(check, measured, limit)
    changes = changes_that_fit(facts, shape)
    fix = "use a smaller model, or one of fewer bits; shorten the rows"
    if changes is not None:
        fix = f"--fit sets {', '.join(f'train.{key}: {value}' for key, value in changes.items())}"
    return Finding(check, "warn", measured, limit, fix)


def family(facts: PreflightInput) -> Finding:
    """Values that were tuned for another kind of model, and a model that nobody has looked at."""
    check, tuned = "family", facts.recipe.preflight.family
    there = str(facts.model_config.get("model_type", "unknown"))
    if tuned is None:
        return passes(check, f"a {there} model; the recipe names no family", "none named")
    limit = f"the recipe's values were tuned for {tuned} models"
    if there == tuned:
        return passes(check, f"a {there} model", limit)
    measured = f"a {there} model" + (", looked at by mlx-ft probe" if facts.probed else "")
    if facts.probed:
        fix = "compare rank, learning rate and modules with what its kind is trained with"
        return Finding(check, "warn", measured, limit, fix)
    fix = f"look at it first: mlx-ft probe {facts.recipe.model}"
    return Finding(check, "fail", measured, limit, fix)


def single_tokens(facts: PreflightInput) -> Finding:
    """Marks that the tokenizer takes apart, so that the model has to spell what should be one."""
    check, limit = "single_tokens", "each is one token"
    if not facts.token_counts:
        return passes(check, "the recipe names none", limit)
    split = [f"{text} is {count} tokens" for text, count in facts.token_counts if count != 1]
    if not split:
        return passes(check, f"{len(facts.token_counts)} texts are one token each", limit)
    fix = "use marks that this model's tokenizer has, or another model"
    return Finding(check, "fail", ", ".join(split), limit, fix)


def gguf(facts: PreflightInput) -> Finding:
    """A model that cannot become the GGUF file that is asked for, which nobody wants to hear after
    the training.
    """
    check, kind = "gguf", facts.recipe.export.gguf
    limit = "a kind of model that the GGUF export knows"
    if kind is None:
        return passes(check, "no GGUF file is asked for", limit)
    fault = gguf_fault(facts.model_config)
    if fault is None:
        return passes(
            check, f"a {facts.model_config.get('model_type')} model can become {kind}", limit
        )
    return Finding(check, "fail", fault, limit, "leave export.gguf out, or use another model")


CHECKS: tuple[Callable[[PreflightInput], Finding], ...] = (
    capacity,
    num_layers,
    lora_keys,
    resume_adapter_file,
    quantized_base,
    dora,
    batch_size,
    schedule,
    disk,
    memory,
    stop_token,
    coverage,
    context,
    validation,
    overlap,
    contamination,
    replay,
    thinking,
    lint,
    tools,
    family,
    single_tokens,
    q_group_size,
    gguf,
    export_base,
)


def base_health(
    answers: int, degenerate: Sequence[tuple[str, str]], reasons: Mapping[Any, str]
) -> Finding:
    """A base model that loops or says nothing before it is trained, so that no training is to blame
    for it; `degenerate` are (prompt, why).
    """
    check, share = "base_health", len(degenerate) / max(1, answers)
    measured = f"{len(degenerate):,} of {answers:,} answers of the base model are degenerate"
    limit = f"at most {MAX_DEGENERATE_BASE:.0%}"
    if not degenerate:
        return passes(check, measured, limit)
    named = "; ".join(f"{prompt}: {why}" for prompt, why in degenerate[:3])
    fix = f"look at it with mlx-ft probe ({named})"
    level: Level = "fail" if share > MAX_DEGENERATE_BASE else "warn"
    return accepted(Finding(check, level, measured, limit, fix), reasons)


def run_checks(facts: PreflightInput) -> tuple[Finding, ...]:
    """Return one finding of every check, in the order of CHECKS; those that the recipe accepts as
    failed are warnings.
    """
    reasons = facts.recipe.preflight.accept
    return tuple(accepted(check(facts), reasons) for check in CHECKS)
