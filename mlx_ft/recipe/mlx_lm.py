"""Read mlx-lm's flat LoRA configuration as a recipe.

Does: note how each key was read, apply mlx-lm's own defaults to missing keys, and refuse
unsupported settings, all at once.
Does not: read files, repeat the recipe's own checks of values, or import mlx-lm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault
from mlx_ft.recipe.data import HUB_PREFIX
from mlx_ft.recipe.fields import number_from_text, optimizer_updates
from mlx_ft.recipe.keys import SYNONYMS, KeyPath, dotted, squeezed
from mlx_ft.recipe.mlx_lm_keys import (
    DEFAULT_ADAPTER_PATH,
    FEATURES,
    FLAT_KEYS,
    HUB_KEYS,
    HUB_SPLITS,
    LORA_DEFAULTS,
    LORA_KEYS,
    MLX_LM_DEFAULT,
    NO_EFFECT,
    RESTRICTED,
    SAME_MEANING,
    SCHEDULES,
    is_mlx_lm_form,
    near_flat_keys,
)
from mlx_ft.recipe.strict_yaml import Source, shown
from mlx_ft.text.suggestions import did_you_mean, suggestion

__all__ = ["Translation", "from_mlx_lm", "is_mlx_lm_form"]


@dataclass(frozen=True)
class Translation:
    """A flat file as a recipe.

    values: nested values of the recipe.
    sources: where each was written.
    notes: how keys were read.
    faults: refused settings.
    adapter_path: folder for the adapter.
    """

    values: dict[str, Any]
    sources: Mapping[KeyPath, Source]
    notes: tuple[str, ...]
    faults: tuple[Fault, ...]
    adapter_path: Path


def _say(value: Any) -> str:
    """Return a value for a note: text as it is, anything else as YAML says it."""
    return value if isinstance(value, str) else shown(value)


@dataclass
class _Reader:
    """Goes through a flat mapping once. Each method notes, translates or refuses keys."""

    flat: Mapping[str, Any]
    places: Mapping[KeyPath, Source]
    label: str
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[KeyPath, Source] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    adapter_path: Path = Path(DEFAULT_ADAPTER_PATH)

    def put(self, recipe_key: str, value: Any, source: Source) -> None:
        """Set a value of the recipe, its parts included, as coming from `source`."""
        key = tuple(recipe_key.split("."))
        node = self.values
        for part in key[:-1]:
            node = node.setdefault(part, {})
        node[key[-1]] = value
        self.sources[key] = source
        items = enumerate(value) if isinstance(value, list) else ()
        for index, _ in items:
            entry = (*key, str(index))
            self.sources[entry] = source

    def place(self, *key: str) -> Source:
        """Return where a flat key was written, as near as it is known."""
        return self.places.get(key, Source(self.label, dotted(key)))

    def refuse(self, key: KeyPath, found: str, fix: str) -> None:
        """Add a fault at a flat key."""
        source = self.places.get(key) or self.places.get(key[:1])
        where = f"{source.where} {dotted(key)}" if source else f"{self.label} {dotted(key)}"
        self.faults.append(Fault(where, found, fix))

    def given(self, name: str) -> Any:
        """Return a flat key's value. As in mlx-lm, null counts as left out."""
        return self.flat.get(name)

    def simple(self, name: str) -> None:
        """Take a key over that means the same in a recipe."""
        recipe_key, default = SAME_MEANING[name]
        value = self.given(name)
        if value is None:
            if default is not None:
                self.put(recipe_key, default, Source(MLX_LM_DEFAULT, name))
            return
        source = self.place(name)
        if name == "optimizer" and isinstance(value, str):
            value = value.lower()
        if name == "num_layers" and value == 0 and not isinstance(value, bool):
            value = -1
        self.put(recipe_key, value, source)
        self.notes.append(f"{name}: {self._meaning(name, recipe_key, value)}")

    def _meaning(self, name: str, recipe_key: str, value: Any) -> str:
        say = _say(value)
        if name == "iters":
            accumulation = number_from_text(self.given("grad_accumulation_steps") or 1)
            count = number_from_text(value)
            if all(type(each) is int and each > 0 for each in (accumulation, count)):
                updates = optimizer_updates(count, accumulation)
                return f"{say} mini-batches = {updates} optimizer updates"
        if name == "max_seq_length":
            return f"{say} tokens; mlx-lm cuts longer rows, here they are dropped and counted"
        if name == "mask_prompt" and value is True:
            return "true, every assistant turn is trained (mlx-lm: the last one)"
        if name == "num_layers" and self.given(name) == 0:
            return "0 is every layer in mlx-lm, read as -1"
        if name == "learning_rate" and isinstance(self.given("lr_schedule"), dict):
            return f"{say}, not used: the schedule has its own peak, as in mlx-lm"
        if name == "resume_adapter_file":
            return f"{say}, its weights are the start; optimizer and data order begin anew"
        return f"{say}, read as {recipe_key}" if recipe_key != name else say

    def restricted(self, name: str) -> None:
        """Accept the values that need nothing, refuse the others with the reason."""
        value = self.given(name)
        accepted, reason, fix = RESTRICTED[name]
        if value is None:
            return
        if any(value is each or (isinstance(each, str) and value == each) for each in accepted):
            self.notes.append(f"{name}: {_say(value)}, nothing to do")
        else:
            self.refuse((name,), f"{shown(value)} {reason}", fix)

    def train(self) -> None:
        """Note that training always happens."""
        value = self.given("train")
        if isinstance(value, bool):
            self.notes.append(f"train: {shown(value)}, a run always trains")
        elif value is not None:
            self.refuse(("train",), f"{shown(value)} is not true or false", "write true or false")

    def data(self) -> None:
        """Refuse a missing data folder. mlx-lm would fetch a data set from the Hub."""
        if self.given("data") is None and self.given("hf_dataset") is None:
            fix = "name a folder with train.jsonl and valid.jsonl"
            found = "is missing; mlx-lm's default is a data set on the Hub, which is not offered"
            self.refuse(("data",), found, fix)
            # Keeps the recipe's own check from reporting the same thing a second time.
            self.put("data.path", "missing", Source(MLX_LM_DEFAULT, "data"))

    def feature(self, name: str, *inside: str) -> None:
        """Take over the name of a part of the rows. The usual name needs nothing."""
        value = self.flat[name] if not inside else self.flat[inside[0]][name]
        part = FEATURES[name]
        if value is not None and value != part:
            self.put(f"data.fields.{part}", value, self.place(*inside, name))
            self.notes.append(f"{dotted((*inside, name))}: {_say(value)}, read as data.fields")

    def hub(self) -> None:
        """Read a dataset of the Hub with its splits, which are mlx-lm's own where none are given.

        As in mlx-lm it takes the place of `data`.
        """
        value = self.given("hf_dataset")
        if value is None:
            return
        if isinstance(value, list):
            found, fix = f"{len(value)} datasets are not offered", "write one, without a list"
            self.refuse(("hf_dataset",), found, fix)
            return
        given = self.section("hf_dataset", HUB_KEYS)
        if given is None:
            return
        path, config = given.get("path"), given.get("config") or {}
        if not isinstance(path, str) or not path:
            self.refuse(("hf_dataset", "path"), f"{shown(path)} is no name", "write org/name")
            return
        self.put("data.path", f"{HUB_PREFIX}{path}", self.place("hf_dataset", "path"))
        for name, default in HUB_SPLITS.items():
            source = Source(MLX_LM_DEFAULT, f"hf_dataset.{name}")
            if name in given:
                source = self.place("hf_dataset", name)
            self.put(f"data.hf.{name}", given.get(name, default), source)
        for name in config if isinstance(config, dict) else ():
            if name in ("name", "revision"):
                key = "config" if name == "name" else name
                self.put(f"data.hf.{key}", config[name], self.place("hf_dataset", "config"))
            else:
                fix = "remove it; name and revision can be honoured"
                self.refuse(("hf_dataset", "config"), f"{name} is not offered", fix)
        for name in FEATURES:
            if name in given:
                self.feature(name, "hf_dataset")
        splits = {name: given.get(name, default) for name, default in HUB_SPLITS.items()}
        self.notes.append(
            f"hf_dataset: {path}, {splits['train_split']} to train, {splits['valid_split']} to "
            "validate; it takes the place of data, as in mlx-lm"
        )
        if "test_split" in given:
            split = _say(given["test_split"])
            self.notes.append(f"hf_dataset.test_split: {split}, no effect without test: true")
        if "mask_prompt" in given:
            outside = self.given("mask_prompt") or SAME_MEANING["mask_prompt"][1]
            self.notes.append(
                f"hf_dataset.mask_prompt: {_say(given['mask_prompt'])}, no effect; as in mlx-lm "
                f"the mask_prompt outside counts, {_say(outside)}"
            )

    def adapter(self) -> None:
        """Keep where the adapter is to be left."""
        value = self.given("adapter_path")
        if isinstance(value, str) and value:
            self.adapter_path = Path(value)
            self.notes.append(f"adapter_path: {value}, where `mlx-ft train` leaves the adapter")
        elif value is not None:
            self.refuse(("adapter_path",), f"{shown(value)} is not a folder", "write a folder name")

    def section(self, name: str, known: tuple[str, ...]) -> dict[str, Any] | None:
        """Return a nested mapping of the flat form, and refuse unknown keys."""
        value = self.given(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse((name,), f"{shown(value)} is not a section", f"write {', '.join(known)}")
            return None
        for key in [key for key in value if key not in known]:
            wanted = SYNONYMS.get(squeezed(key), "").rpartition(".")[2]
            word = wanted if wanted in known else key
            fix = suggestion(word, known, f"the keys here are {', '.join(known)}")
            self.refuse((name, key), "is not a known key; mlx-lm ignores it silently", fix)
        return {key: value[key] for key in known if value.get(key) is not None}

    def lora(self) -> None:
        """Take over rank, strength, dropout and keys. mlx-lm's scale stays a scale."""
        given = self.section("lora_parameters", LORA_KEYS) or {}
        defaults = {k: v for k, v in LORA_DEFAULTS.items() if k != "scale" or "alpha" not in given}
        for key, value in {**defaults, **given}.items():
            recipe_key = f"train.lora_parameters.{key}"
            if key not in given:
                self.put(recipe_key, value, Source(MLX_LM_DEFAULT, f"lora_parameters.{key}"))
                continue
            self.put(recipe_key, value, self.place("lora_parameters", key))
            say = ", ".join(map(str, value)) if isinstance(value, list) else _say(value)
            extra = {"scale": ", kept as scale", "alpha": ", which mlx-lm itself has not"}
            self.notes.append(f"lora_parameters.{key}: {say}{extra.get(key, '')}")

    def optimizer_options(self) -> None:
        """Take the options of the chosen optimizer and leave those of the others."""
        configs = self.given("optimizer_config")
        if configs is None:
            return
        if not isinstance(configs, dict):
            found = f"{shown(configs)} is not a section"
            self.refuse(("optimizer_config",), found, "write it as NAME: {OPTION: VALUE}")
            return
        name = self.given("optimizer")
        chosen = name.lower() if isinstance(name, str) else SAME_MEANING["optimizer"][1]
        for optimizer, options in configs.items():
            label = f"optimizer_config.{optimizer}"
            if optimizer != chosen:
                self.notes.append(f"{label}: not used, the optimizer is {chosen}")
            elif options is not None:
                source = self.place("optimizer_config", optimizer)
                self.put("train.optimizer_config", options, source)
                self.notes.append(f"{label}: read as train.optimizer_config")

    def report_to(self) -> None:
        """Read the names of trackers, with commas between them."""
        value = self.given("report_to")
        if value is None or value == "":
            return
        names = value.split(",") if isinstance(value, str) else value
        if isinstance(names, list):
            names = [name.strip().lower() if isinstance(name, str) else name for name in names]
        self.put("train.report_to", names, self.place("report_to"))
        self.notes.append(f"report_to: {_say(value)}, read as train.report_to")

    def schedule(self) -> None:
        """Read mlx-lm's warm-up and decay. As in mlx-lm, its arguments replace learning_rate."""
        given = self.section("lr_schedule", ("name", "warmup", "warmup_init", "arguments"))
        if given is None:
            return
        name, arguments = given.get("name"), given.get("arguments")
        if not isinstance(name, str) or name not in SCHEDULES:
            found = f"{shown(name)} is not offered" if name else "is missing"
            self.refuse(("lr_schedule", "name"), found, f"use {' or '.join(SCHEDULES)}")
            return
        sizes = (2, 3) if name == "cosine_decay" else (3,)
        if not isinstance(arguments, list) or len(arguments) not in sizes:
            form = "[peak, updates, end]" if name == "cosine_decay" else "[peak, end, updates]"
            found = f"{shown(arguments)} does not fit {name}"
            self.refuse(("lr_schedule", "arguments"), found, f"write {form}")
            return
        if name == "cosine_decay":
            peak, steps, end = (*arguments, 0.0)[:3]
        else:
            peak, end, steps = arguments
        numbers = [number_from_text(each) for each in (peak, end)]
        if all(isinstance(each, int | float) for each in numbers) and numbers[1] > numbers[0]:
            found = f"rises from {peak} to {end}; only falling rates are offered"
            self.refuse(("lr_schedule", "arguments"), found, "use warmup for the rise")
            return
        source = self.place("lr_schedule", "arguments")
        prefix = "train.lr_schedule."
        self.put(f"{prefix}name", SCHEDULES[name], self.place("lr_schedule", "name"))
        self.put(f"{prefix}decay_steps", steps, source)
        self.put(f"{prefix}end", end, source)
        self.put(f"{prefix}allow_unfinished", True, Source(MLX_LM_DEFAULT, "lr_schedule"))
        self.put("train.learning_rate", peak, source)
        text = f"lr_schedule: {name} {arguments} -> {SCHEDULES[name]}, learning_rate {peak}, "
        text += f"decay_steps {steps}, end {end}"
        warmup, start = given.get("warmup"), given.get("warmup_init")
        if warmup:
            self.put(f"{prefix}warmup_steps", warmup, self.place("lr_schedule", "warmup"))
            text += f", warmup_steps {warmup}"
            if start is not None:
                self.put(f"{prefix}warmup_init", start, self.place("lr_schedule", "warmup_init"))
                text += f", warmup_init {start}"
        self.notes.append(f"{text}; all counted in optimizer updates, as in mlx-lm")

    def unknown(self) -> None:
        """Refuse every key that mlx-lm would silently ignore."""
        for name in self.flat:
            if name not in FLAT_KEYS:
                fix = did_you_mean(near_flat_keys(name), "remove it, or write a recipe instead")
                self.refuse((name,), "is not a known key; mlx-lm ignores it silently", fix)


def from_mlx_lm(
    flat: Mapping[str, Any], places: Mapping[KeyPath, Source], label: str
) -> Translation:
    """Return a flat configuration as recipe values with their sources, notes and faults.

    places: flat key path -> where it was written.
    label: name of the file.
    Judges only what the recipe's own rules cannot see.
    """
    reader = _Reader(flat, places, label)
    steps: dict[str, Callable[[], None]] = {
        "train": reader.train,
        "adapter_path": reader.adapter,
        "lora_parameters": reader.lora,
        "optimizer_config": reader.optimizer_options,
        "report_to": reader.report_to,
    }
    order = [*flat, *(name for name in (*SAME_MEANING, *steps) if name not in flat)]
    for name in order:
        if name in SAME_MEANING:
            reader.simple(name)
        elif name in RESTRICTED:
            reader.restricted(name)
        elif name in FEATURES:
            reader.feature(name)
        elif name in steps:
            steps[name]()
        elif name in NO_EFFECT and flat[name] is not None:
            reader.notes.append(f"{name}: {NO_EFFECT[name]}")
    reader.data()
    reader.hub()
    reader.schedule()
    reader.unknown()
    left_out = [
        f"{source.key} {_say(_value_of(reader.values, key))}"
        for key, source in reader.sources.items()
        if source.where == MLX_LM_DEFAULT
        and source.key != "lr_schedule"
        and key != ("data", "path")
    ]
    if left_out:
        reader.notes.append(f"left out, so mlx-lm's defaults: {', '.join(left_out)}")
    return Translation(
        reader.values,
        reader.sources,
        tuple(reader.notes),
        tuple(reader.faults),
        reader.adapter_path,
    )


def _value_of(values: Mapping[str, Any], key: KeyPath) -> Any:
    node: Any = values
    for part in key:
        node = node[part]
    return node
