"""The `train` section of a recipe: adapter, length, learning rate, selection.

Does: declare the keys and the checks between them. Does not: train, or check them against data, a
model or the machine.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mlx_ft.recipe.fields import Conflict, Real, Section, Text, Whole, optimizer_updates
from mlx_ft.recipe.optimizers import optimizer_option_faults, plain_options

TrackerName = Literal["trackio", "wandb", "tensorboard", "mlflow", "swanlab"]
DEFAULT_EPOCHS = 2
DEFAULT_SCALE = 2.0
# Two fixed sizes beside `micro_batch_tokens`, which bound memory too but are not settable. They are
# here because training and the memory forecast of preflight use them, and preflight loads no MLX.
# Padded tokens that frozen layers take at a time: enough to keep the processor busy; more would
# only pad more and take more memory.
PREFIX_GROUP_TOKENS = 1024
# Logits that are computed at a time (bytes). Smaller parts make the product slow and larger ones
# gain little: 1.82 ms a position at 4 MiB, 1.24 at 16, 1.15 at 32 (49,152 words, hidden size 576,
# two cores of a CPU).
LOGITS_PART_BYTES = 16 << 20
# A GPU's products have tiles of at least 32 rows: of Gemma's 262,144 words this holds 64.
GPU_LOGITS_PART_BYTES = 64 << 20


def _off_as_text(value: Any) -> Any:
    """Return `off` for false, as YAML reads it. Other values are returned unchanged."""
    return "off" if value is False else value


PrefixCache = Annotated[Literal["disk", "memory", "off"], BeforeValidator(_off_as_text)]


class LoraParameters(Section):
    """Size and strength of the adapter."""

    rank: Whole = Field(8, ge=1, description="Rank of each adapter matrix.")
    alpha: Real | None = Field(
        None, gt=0, description="Strength as alpha; the effective scale is alpha / rank."
    )
    scale: Real | None = Field(
        None, gt=0, description="Strength as mlx-lm's scale; 2.0 when alpha is not given either."
    )
    rslora: bool = Field(
        False, description="Rank-stabilised: the effective scale is alpha / sqrt(rank)."
    )
    dropout: Real = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    keys: list[Text] | None = Field(
        None,
        min_length=1,
        description="Modules to adapt, such as `self_attn.q_proj`; left out: every linear layer.",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_strength(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("alpha") is values.get("scale") is None:
            return {**values, "scale": DEFAULT_SCALE}
        return values

    def conflicts(self) -> list[Conflict]:
        """Return a conflict when the strength is given twice, or as rslora cannot have it."""
        key = "train.lora_parameters."
        if self.alpha is not None and self.scale is not None:
            both = (f"{key}alpha", f"{key}scale")
            fix = "keep one (scale = alpha / rank)"
            return [Conflict(both, "alpha and scale are both given", fix)]
        if self.rslora and self.alpha is None:
            found = "rslora is true but there is no alpha to divide by sqrt(rank)"
            return [Conflict((f"{key}rslora", f"{key}scale"), found, "give alpha, without scale")]
        return []

    @property
    def effective_scale(self) -> float:
        """The factor on the adapter's output: `scale`, or alpha / rank, or with rslora
        alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732, theorem 3.2).
        """
        if self.alpha is not None:
            return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
        return DEFAULT_SCALE if self.scale is None else self.scale


class LrSchedule(Section):
    """Shape of the learning rate, counted in optimizer updates."""

    name: Literal["constant", "linear", "cosine", "cosine_with_restarts"] = Field(
        "constant", description="Shape after warm-up."
    )
    warmup_steps: Whole | None = Field(None, ge=0, description="Warm-up in optimizer updates.")
    warmup_ratio: Real | None = Field(
        None, ge=0, lt=1, description="Warm-up as a share of all updates; or give warmup_steps."
    )
    warmup_init: Real = Field(0.0, ge=0, description="Learning rate at the start of warm-up.")
    cycles: Whole = Field(1, ge=1, description="Number of cosine cycles (cosine_with_restarts).")
    decay_steps: Whole | None = Field(
        None, ge=1, description="Updates until the end value; the rest of the run when left out."
    )
    end: Real = Field(0.0, ge=0, description="Learning rate at the end of the decay.")

    allow_unfinished: bool = Field(
        False, description="Let the run end before warm-up and decay_steps are over."
    )

    def warmup_updates(self, updates: int) -> int:
        """Return how many updates the warm-up takes in a run of `updates`."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil((self.warmup_ratio or 0.0) * updates)

    def conflicts(self) -> list[Conflict]:
        """Return conflicts within this learning-rate schedule."""
        prefix = "train.lr_schedule."
        found = []
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            found.append(
                Conflict(
                    (f"{prefix}warmup_steps", f"{prefix}warmup_ratio"),
                    "warmup_steps and warmup_ratio are both given",
                    "keep one",
                )
            )
        if self.warmup_init > 0 and not self.warmup_steps and not self.warmup_ratio:
            found.append(
                Conflict(
                    (f"{prefix}warmup_init", f"{prefix}warmup_steps", f"{prefix}warmup_ratio"),
                    f"warmup_init is {self.warmup_init:g} but there is no warm-up",
                    "give warmup_steps or warmup_ratio, or remove warmup_init",
                )
            )
        if self.cycles > 1 and self.name != "cosine_with_restarts":
            found.append(
                Conflict(
                    (f"{prefix}cycles", f"{prefix}name"),
                    f"cycles is {self.cycles} but {self.name} has no cycles",
                    "use name: cosine_with_restarts, or remove cycles",
                )
            )
        for key, given in (("decay_steps", self.decay_steps), ("end", self.end)):
            if given and self.name == "constant":
                found.append(
                    Conflict(
                        (f"{prefix}{key}", f"{prefix}name"),
                        f"{key} is {given:g} but a constant rate does not decay",
                        f"use name: linear or cosine, or remove {key}",
                    )
                )
        return found


class SelectRecipe(Section):
    """Which weights of a run are the ones that leave it."""

    metric: Literal["mean", "passed", "validation_loss"] | None = Field(
        None,
        description="What chooses the weights. mean: mean score of the suite; passed: share of its "
        "prompts with the full score; both with ties by validation loss; validation_loss: that "
        "alone. Null: mean where there is a suite, else the last weights are taken.",
    )
    suite: Text | None = Field(
        None,
        description="Suite that is asked during training. One of `eval.suites` may be named: the "
        "prompts that choose are then left out of the evaluation.",
    )
    limit: Whole = Field(
        24, ge=1, description="Prompts that choose, taken from each category in turn."
    )
    every: Whole | None = Field(
        None,
        ge=1,
        description="Mini-batches between comparisons; a validation goes with each. Null: "
        "steps_per_eval.",
    )
    patience: Whole | None = Field(
        None, ge=1, description="Comparisons without a better one that end the run. Null: none do."
    )
    gate: Real = Field(
        0.8,
        gt=0,
        le=1,
        description="With several seeds: score from which one counts as having learned the task.",
    )

    @property
    def by(self) -> str | None:
        """The metric that chooses the weights, or None for the last weights."""
        return self.metric or (None if self.suite is None else "mean")

    @property
    def asks(self) -> bool:
        """Whether the model is asked during training."""
        return self.by in ("mean", "passed")

    def conflicts(self) -> list[Conflict]:
        """Return missing and needless settings of a selection."""
        keys = ("train.select.metric", "train.select.suite")
        if self.asks and self.suite is None:
            return [Conflict(keys, f"{self.metric} needs a suite to be asked", "give suite")]
        if not self.asks and self.suite is not None:
            found = "a suite is given, but validation_loss asks nothing"
            return [Conflict(keys[::-1], found, "remove suite, or use metric: mean")]
        return [
            Conflict(
                (f"train.select.{key}", *keys),
                f"{key} is {given} but nothing is selected by",
                "give suite, or metric: validation_loss",
            )
            for key, given in (("every", self.every), ("patience", self.patience))
            if self.by is None and given is not None
        ]


class TrainRecipe(Section):
    """How the adapter is trained."""

    num_layers: Whole = Field(
        16, ge=-1, description="Top layers that are adapted; the rest stay frozen. -1: all."
    )
    fine_tune_type: Literal["lora", "dora", "full"] = Field(
        "lora",
        description="An adapter (LoRA, or DoRA with its magnitudes), or full: every weight of the "
        "top layers, for models that are not quantized.",
    )
    lora_parameters: LoraParameters = Field(
        default_factory=LoraParameters, description="Size and strength of the adapter."
    )
    batch_size: Whole = Field(4, ge=1, description="Rows a mini-batch.")
    grad_accumulation_steps: Whole = Field(
        1, ge=1, description="Mini-batches to one optimizer update."
    )
    micro_batch_tokens: Whole = Field(
        1024,
        ge=1,
        description="Tokens that go through the model at a time, a row at least; bounds memory, "
        "and changes no result beyond round-off.",
    )
    epochs: Whole | None = Field(
        None, ge=1, description="Passes over the rows; 2 when iters is not given either."
    )
    iters: Whole | None = Field(None, ge=1, description="Mini-batches in all; or give epochs.")
    learning_rate: Real = Field(1e-5, gt=0, description="Peak learning rate.")
    lr_schedule: LrSchedule = Field(
        default_factory=LrSchedule, description="Shape of the learning rate."
    )
    optimizer: Literal["adam", "adamw", "muon", "sgd", "adafactor", "lion"] = Field(
        "adam", description="Any optimizer of mlx."
    )
    optimizer_config: Annotated[dict[str, Any], BeforeValidator(plain_options)] = Field(
        default_factory=dict, description="Its options, such as `{weight_decay: 0.01}`."
    )
    grad_checkpoint: bool = Field(
        False, description="Compute activations of each layer twice instead of keeping them."
    )
    low_memory: bool = Field(
        False,
        description="Read weights of frozen layers from the disk each time they are needed and "
        "keep none of them; without dropout, compute what norms and gates give a LoRA twice "
        "instead of keeping it; on a CPU, compute with weights as stored, which is slow there.",
    )
    prefix_cache: PrefixCache = Field(
        "disk",
        description="Where outputs of frozen layers are kept. disk: in a file that later runs find "
        "again, in memory when it does not fit; memory; off: computed every time.",
    )
    max_grad_norm: Real | None = Field(
        None, gt=0, description="Longest gradient; a longer one is scaled down. Null: no limit."
    )
    steps_per_report: Whole = Field(10, ge=1, description="Mini-batches between report lines.")
    steps_per_eval: Whole = Field(200, ge=1, description="Mini-batches between validations.")
    save_every: Whole = Field(100, ge=1, description="Mini-batches between checkpoints.")
    segment_steps: Whole | None = Field(
        None,
        ge=1,
        description="Mini-batches after which a new process goes on, with the same bits; for runs "
        "that use something up that only the end of a process gives back. Null: one process.",
    )
    keep_checkpoints: Whole = Field(2, ge=2, description="How many checkpoints are kept.")
    val_batches: Whole = Field(
        -1, ge=-1, description="Mini-batches of the fixed validation set. -1: all of it."
    )
    seed: Whole = Field(0, ge=0, description="Seed of the adapter's start and of the data order.")
    seeds: list[Whole] = Field(
        default_factory=list,
        description="Seeds of several trainings, the best of which is exported: by train.select, "
        "else by validation loss. Empty: `seed` alone.",
    )
    select: SelectRecipe = Field(
        default_factory=SelectRecipe, description="Which weights of a run leave it."
    )
    resume_adapter_file: Text | None = Field(
        None, description="Adapter weights to start from (weights only, as in mlx-lm)."
    )

    report_to: list[TrackerName] = Field(
        default_factory=list,
        description="Trackers that are told of the run, each a package of its own to install. "
        "None of them can stop it.",
    )
    project_name: Text | None = Field(
        None, description="The run's project there; `mlx-ft` when left out."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_length(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("epochs") is values.get("iters") is None:
            return {**values, "epochs": DEFAULT_EPOCHS}
        return values

    @property
    def computes_inputs_again(self) -> bool:
        """Whether LoRA layers keep no inputs that a norm or a gate has made."""
        plain_lora = self.fine_tune_type == "lora" and self.lora_parameters.dropout == 0
        return self.low_memory and plain_lora and not self.grad_checkpoint

    def conflicts(self) -> list[Conflict]:
        """Return conflicts between the length of the run, its optimizer and its schedule."""
        found = []
        if self.epochs is not None and self.iters is not None:
            found.append(
                Conflict(
                    ("train.epochs", "train.iters"),
                    "epochs and iters are both given",
                    "keep one (--set train.epochs=null or --set train.iters=null takes one out)",
                )
            )
        if len(set(self.report_to)) < len(self.report_to):
            twice = Conflict(("train.report_to",), "names a tracker twice", "name it once")
            found.append(twice)
        for key, given, meaning in (
            ("num_layers", self.num_layers, "nothing would be trained - -1 means all layers"),
            ("val_batches", self.val_batches, "nothing would be validated - -1 means all rows"),
        ):
            if given == 0:
                nothing, fix = meaning.split(" - ")
                found.append(Conflict((f"train.{key}",), f"{key} is 0, so {nothing}", fix))
        if self.fine_tune_type == "full" and self.lora_parameters.keys is not None:
            keys = ("train.lora_parameters.keys", "train.fine_tune_type")
            found.append(
                Conflict(keys, "keys are given but full trains whole layers", "remove keys")
            )
        found += self._seed_conflicts()
        return [*found, *self._optimizer_conflicts(), *self._schedule_conflicts()]

    def _seed_conflicts(self) -> list[Conflict]:
        keys = ("train.seeds", "train.seed")
        if self.seeds and self.seed:
            return [Conflict(keys, "seed and seeds are both given", "keep one")]
        if any(seed < 0 for seed in self.seeds):
            return [Conflict(keys, "a seed is negative", "seeds are 0 or more")]
        if len(set(self.seeds)) < len(self.seeds):
            return [Conflict(keys, "a seed is given twice", "name each once")]
        return []

    def _optimizer_conflicts(self) -> list[Conflict]:
        keys = ("train.optimizer_config", "train.optimizer")
        faults = optimizer_option_faults(self.optimizer, self.optimizer_config)
        return [Conflict(keys, found, fix) for found, fix in faults]

    def _schedule_conflicts(self) -> list[Conflict]:
        schedule = self.lr_schedule
        found = []
        if schedule.name != "constant" and schedule.end > self.learning_rate:
            found.append(
                Conflict(
                    ("train.lr_schedule.end", "train.learning_rate", "train.lr_schedule.name"),
                    f"end is {schedule.end:g}, above the peak learning_rate {self.learning_rate:g}",
                    "lower end or raise learning_rate",
                )
            )
        if self.iters is None or schedule.allow_unfinished:
            return found
        updates = optimizer_updates(self.iters, self.grad_accumulation_steps)
        warmup, decay = schedule.warmup_updates(updates), schedule.decay_steps
        # What follows the warm-up needs an update at least.
        if warmup + (decay or 1) > updates:
            given = [
                f"train.lr_schedule.{key}"
                for key in ("warmup_steps", "warmup_ratio", "decay_steps")
                if getattr(schedule, key)
            ]
            shape = f"warm-up of {warmup}" + (f" and decay of {decay}" if decay else "")
            longer = "longer than" if warmup + (decay or 0) > updates else "as long as"
            found.append(
                Conflict(
                    (*given, "train.iters", "train.grad_accumulation_steps"),
                    f"a {shape} optimizer updates is {longer} the run: {self.iters} iters make "
                    f"{updates} optimizer updates",
                    "shorten it or raise iters; allow_unfinished: true lets the run end first",
                )
            )
        return found
