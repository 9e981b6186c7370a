"""The tables of the reference that come from the code: recipe keys, commands, suites.

`python docs/generate.py docs/reference.md` rewrites the blocks between
`<!-- generated:NAME -->` and `<!-- /generated -->` (NAME: recipe-keys, cli, suites, suite-keys,
scorers, gates); `--check` only says whether they are right.
Does not: describe anything that the code does not declare.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_ft.recipe.keys import dotted, section_of, value_keys
from mlx_ft.recipe.strict_yaml import read_mapping, shown

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"(?P<open><!-- generated:(?P<name>[a-z-]+) -->\n)(?P<body>.*?)(?P<close><!-- /generated -->)",
    re.DOTALL,
)
TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false"}
LIMITS = (
    ("minimum", "at least {}"),
    ("ge", "at least {}"),
    ("exclusiveMinimum", "more than {}"),
    ("gt", "more than {}"),
    ("exclusiveMaximum", "below {}"),
    ("lt", "below {}"),
)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; `|` and line breaks inside cells are made harmless."""

    def line(cells: Sequence[str]) -> str:
        safe = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
        return f"| {' | '.join(safe)} |\n"

    return line(head) + line(["---"] * len(head)) + "".join(map(line, rows))


def _type_words(schema: Mapping[str, Any], sections: Mapping[str, Any]) -> str:
    """Return a value's type and limits in words, from its JSON schema and those of `sections`."""
    options = [each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]
    words = []
    for option in options:
        if "enum" in option:
            words.append(", ".join(f"`{each}`" for each in option["enum"]))
        elif option.get("type") == "array":
            words.append(f"list of {_type_words(option['items'], sections)}")
        elif "$ref" in option:
            keys = sections[option["$ref"].rsplit("/", 1)[-1]]["properties"]
            words.append(f"`{{{', '.join(keys)}}}`")
        elif option.get("type") == "object":
            words.append("options")
        else:
            limits = [text.format(option[name]) for name, text in LIMITS if name in option]
            words.append(" ".join([TYPES[option["type"]], " and ".join(limits)]).strip())
    return " or ".join(words)


def _default_words(schema: Mapping[str, Any], default: Any, required: bool) -> str:
    if required:
        return "required"
    if default is None:
        return ""
    if isinstance(default, list):
        return f"`[{', '.join(map(str, default))}]`"
    if isinstance(default, dict):
        return "`{}`"
    return f"`{default if isinstance(default, str) else shown(default)}`"


def recipe_keys() -> str:
    """Return the table of all recipe keys: key, type and limits, default, meaning."""
    rows = []
    for key in value_keys():
        section = section_of(key[:-1])
        assert section is not None, f"{key} lies outside of any section"
        field = section.model_fields[key[-1]]
        whole = section.model_json_schema()
        schema = whole["properties"][key[-1]]
        # A recipe's name is taken from its file.
        required = field.is_required() and key != ("name",)
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        cells = [
            f"`{dotted(key)}`",
            _type_words(schema, whole.get("$defs", {})),
            _default_words(schema, default, required),
            field.description or "",
        ]
        rows.append(cells)
    return table(["key", "type", "default", "meaning"], rows)


def _commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (full name, command) of a click group, the groups inside it included."""
    for child_name in sorted(group.commands):
        child = group.commands[child_name]
        if getattr(child, "hidden", False):
            continue
        full = f"{name} {child_name}"
        if hasattr(child, "commands"):
            yield from _commands(child, full)
        else:
            yield full, child


def _parameter_row(parameter: Any) -> list[str]:
    is_option = parameter.param_type_name == "option"
    names = (
        [*parameter.opts, *parameter.secondary_opts]
        if is_option
        else [parameter.human_readable_name]
    )
    takes_value = is_option and not (parameter.is_flag or parameter.count)
    choices = getattr(parameter.type, "choices", None)
    kind = "/".join(map(str, choices)) if choices else str(parameter.type.name).upper()
    value = parameter.metavar or kind
    default = parameter.default
    plain = isinstance(default, str | int | float | Path) and not isinstance(default, bool)
    text = getattr(parameter, "help", None) or ("required" if parameter.required else "")
    if plain and is_option and not parameter.multiple:
        text = f"{text} Default: {default}."
    shown_names = ", ".join(f"`{each}`" for each in names)
    return [f"{shown_names} {value}" if takes_value else shown_names, text]


def cli_reference(group: Any, name: str = "mlx-ft") -> str:
    """Return a section a command of a click group: what it does, its arguments and options."""
    parts = []
    for full, command in _commands(group, name):
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        usage = " ".join([full, *(each.human_readable_name for each in arguments), "[OPTIONS]"])
        help_text = " ".join((command.help or "").split("\f")[0].split())
        rows = [
            _parameter_row(each) for each in command.params if not getattr(each, "hidden", False)
        ]
        body = table(["name", "meaning"], rows)
        parts.append(
            f"**`{usage}`**: {help_text}\n\n{body}" if rows else f"**`{usage}`**: {help_text}\n"
        )
    return "\n".join(parts)


def _own_commands() -> str:
    from mlx_ft.cli.main import cli

    return cli_reference(cli)


def suites(folder: Path) -> str:
    """Return the table of the evaluation suites in `folder`: what they ask and how they score."""
    rows = []
    for path in sorted(folder.glob("*.yaml")):
        reading = read_mapping(path.read_text(encoding="utf-8"), str(path))
        assert not reading.faults, f"{path}: {reading.faults}"
        suite = reading.value
        samples = path.parent / suite["samples"]
        count = sum(1 for line in samples.read_text(encoding="utf-8").splitlines() if line.strip())
        scorer = suite["scorer"]
        scorer_name = scorer["name"] if isinstance(scorer, dict) else scorer
        rows.append(
            [f"`{folder.name}/{path.name}`", str(count), f"`{scorer_name}`", suite["description"]]
        )
    return table(["suite", "prompts", "scorer", "what it measures"], rows)


def _keys_of(section: type[Any], leave_out: Sequence[str] = ()) -> str:
    """Return the keys of a section in words, those that may be left out in brackets."""
    names = []
    for name, field in section.model_fields.items():
        shown_name = f"`{field.alias or name}`"
        if name not in leave_out:
            names.append(shown_name if field.is_required() else f"[{shown_name}]")
    return ", ".join(names)


def suite_keys() -> str:
    """Return the tables of the keys of a suite's two files."""
    from mlx_ft.evaluate.suite_keys import SampleLine, SuiteFile

    parts = []
    for head, section in (("key of the YAML file", SuiteFile), ("key of a sample", SampleLine)):
        schema = section.model_json_schema()
        rows = []
        for name, field in section.model_fields.items():
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            words = _default_words(schema["properties"][name], default, field.is_required())
            rows.append([f"`{name}`", words, field.description or ""])
        parts.append(table([head, "default", "meaning"], rows))
    return "\n".join(parts)


def scorers() -> str:
    """Return the table of the scorers: their keys, their targets' keys, and their rule."""
    from mlx_ft.evaluate.scorers.registry import SCORERS

    rows = []
    for name, entry in SCORERS.items():
        text = " ".join((entry.rule.__doc__ or "").split())
        keys, target = _keys_of(entry.keys, ["name"]), _keys_of(entry.target)
        rows.append([f"`{name}`", keys, target, text])
    return table(["scorer", "its keys", "target", "rule"], rows)


def gates() -> str:
    """Return the table of the metrics that a gate may be on."""
    from mlx_ft.recipe.gates import METRICS

    return table(["metric", "meaning"], [[f"`{name}`", text] for name, text in METRICS.items()])


def rewritten(text: str, generators: Mapping[str, Callable[[], str]]) -> str:
    """Return `text` with every generated block made anew.

    Raises ValueError for a name that is not known, a block that is not closed, or none at all.
    """
    opened, closed = text.count("<!-- generated:"), len(BLOCK.findall(text))
    if not opened or opened != closed:
        raise ValueError(f"{opened} generated blocks are opened, {closed} of them are whole")

    def fresh(block: re.Match[str]) -> str:
        name = block["name"]
        if name not in generators:
            raise ValueError(f"generated:{name} is none of {', '.join(generators)}")
        return f"{block['open']}{generators[name]()}{block['close']}"

    return BLOCK.sub(fresh, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check the blocks of a file; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python docs/generate.py", description=__doc__)
    parser.add_argument("file", type=Path, help="Markdown file with generated blocks")
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 on difference")
    options = parser.parse_args(arguments)
    generators: dict[str, Callable[[], str]] = {
        "recipe-keys": recipe_keys,
        "cli": _own_commands,
        "suite-keys": suite_keys,
        "scorers": scorers,
        "gates": gates,
        "suites": lambda: suites(ROOT / "evals"),
    }
    try:
        old = options.file.read_text(encoding="utf-8")
        new = rewritten(old, generators)
    except (OSError, ValueError) as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return 2
    if not options.check:
        options.file.write_text(new, encoding="utf-8")
        return 0
    if old == new:
        return 0
    difference = difflib.unified_diff(
        old.splitlines(), new.splitlines(), f"{options.file}", "generated", lineterm="", n=0
    )
    print("\n".join(difference), file=sys.stderr)
    print(
        f"{options.file}: generated blocks differ from the code - "
        f"run python docs/generate.py {options.file}",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
