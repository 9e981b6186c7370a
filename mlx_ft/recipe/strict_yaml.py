"""YAML with line numbers, no surprises, bounded size.

Stricter than YAML 1.1: 1e-5 is a number; 2025-01-01 and 12:30 stay text. Repeated keys, tags, merge
keys and oversized files are faults. All faults of a text are reported together, each with its line.
PyYAML's own loaders stay unchanged.
Does not: know the meaning of values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlx_ft.errors import Fault
from mlx_ft.text.quantities import format_bytes
from mlx_ft.text.safe import as_label, has_control, quoted

LARGEST_FILE_BYTES = 1_000_000
LARGEST_DEPTH = 20
MOST_VALUES = 5_000
KeyPath = tuple[str, ...]
TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Source:
    """Where a value was written: `where` (file:line, or `--set`), the `key` as it stands there."""

    where: str
    key: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.where} {self.key}"


@dataclass(frozen=True)
class Reading:
    """Content of a YAML text.

    value: the value, or the readable part of it if there are faults.
    sources: key path -> where it was written. List items count as keys "0", "1", ...
    faults: all problems of the text.
    """

    value: Any
    sources: Mapping[KeyPath, Source]
    faults: tuple[Fault, ...]


class _TooBig(Exception):
    """More values or levels than anything that is read here has."""


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's reader and parser with implicit types of its own, and an end to its patience."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.nodes += 1
        if self.nodes > 2 * MOST_VALUES:
            raise _TooBig
        return super().compose_node(parent, index)


_StrictLoader.yaml_implicit_resolvers = {}

for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (
        "bool",
        r"(?i:true|false|yes|no|on|off)",
        list("tTfFyYnNoO"),
    ),
    ("int", r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?([0-9]+(_[0-9]+)*(\.[0-9]*)?([eE][-+]?[0-9]+)|[0-9]+(_[0-9]+)*\.[0-9]*"
        r"|\.[0-9]+([eE][-+]?[0-9]+)?)|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _StrictLoader.add_implicit_resolver(TAG + _tag, re.compile(rf"^(?:{_pattern})$"), _first)


def _float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


SCALARS: Mapping[str, Callable[[str], Any]] = {
    TAG + "null": lambda text: None,
    TAG + "bool": lambda text: text.lower() in ("true", "yes", "on"),
    TAG + "int": int,
    TAG + "float": lambda text: _float(text.lower()),
    TAG + "str": lambda text: text,
}


def key_path(location: Sequence[int | str]) -> KeyPath:
    """Return the key path of a pydantic error, as it was written.

    For a wrong key of a mapping, pydantic adds a `[key]` of its own, which is left out.
    """
    return tuple(str(part) for part in location if part != "[key]")


def shown(value: Any, limit: int = 60) -> str:
    """Return a value as YAML would say it, on one line and short, for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list):
        return f"a {'section' if isinstance(value, dict) else 'list'} of {len(value)}"
    return quoted(value, limit)


class _Walk:
    """One pass over the parsed nodes: collects values, sources and faults."""

    def __init__(self, label: str, white: str) -> None:
        self.label = label
        self.white = white
        self.sources: dict[KeyPath, Source] = {}
        self.faults: list[Fault] = []
        self.left = MOST_VALUES

    def source(self, node: yaml.Node, key: KeyPath) -> Source:
        line = node.start_mark.line + 1
        return Source(f"{self.label}:{line}", ".".join(key), line)

    def fault(self, node: yaml.Node, key: KeyPath, found: str, fix: str) -> None:
        self.faults.append(Fault(str(self.source(node, key)).strip(), found, fix))

    def value(self, node: yaml.Node, key: KeyPath) -> Any:
        self.left -= 1
        if self.left < 0 or len(key) > LARGEST_DEPTH:
            raise _TooBig
        if isinstance(node, yaml.MappingNode) and node.tag == TAG + "map":
            return self.mapping(node, key)
        if isinstance(node, yaml.SequenceNode) and node.tag == TAG + "seq":
            return [self.item(item, (*key, str(i))) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in SCALARS:
            return self.scalar(node, key)
        self.fault(node, key, f"the tag {shown(node.tag)} is not read", "remove the tag")
        return None

    def item(self, node: yaml.Node, key: KeyPath) -> Any:
        self.sources[key] = self.source(node, key)
        return self.value(node, key)

    def scalar(self, node: yaml.ScalarNode, key: KeyPath) -> Any:
        try:
            value = SCALARS[node.tag](node.value)
        except ValueError:
            self.fault(node, key, f"{shown(node.value)} is not a number", "write a number")
            return None
        if isinstance(value, str) and has_control(value, kept=self.white):
            self.fault(node, key, f"{shown(value)} has a control character", "remove it")
            return None
        return value

    def mapping(self, node: yaml.MappingNode, key: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name = self.name(key_node, key)
            if name is None:
                continue
            path = (*key, name)
            if name in values:
                first = self.sources[path].line
                self.fault(key_node, path, f"is given again (first in line {first})", "keep one")
                continue
            self.sources[path] = self.source(key_node, path)
            values[name] = self.value(value_node, path)
        return values

    def name(self, node: yaml.Node, key: KeyPath) -> str | None:
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        if text == "<<":
            self.fault(node, key, "merge keys (<<) are not read", "write the keys out")
        elif text is None or node.tag != TAG + "str" or has_control(text):
            what = "a list or section" if text is None else shown(text)
            self.fault(node, key, f"{what} cannot be a key", "use a name, in quotes if need be")
        else:
            return str(text)
        return None


def _syntax_fault(error: yaml.YAMLError, text: str, label: str) -> Fault:
    """Say where and why a text is not YAML."""
    fix = "check the indentation, quotes and brackets of this line and the one above"
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Fault(f"{label}:{line}", "has a character that is not text", "remove it")
    problem, line = "is not YAML", 0
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 0
        problem = f"is not YAML: {error.problem or error.context}"
        if error.context_mark and error.context_mark.line + 1 != line:
            problem += f" ({error.context} that begins in line {error.context_mark.line + 1})"
        letter = mark.buffer[mark.pointer : mark.pointer + 1] if mark and mark.buffer else ""
        if letter == "\t":
            problem, fix = "a tab where spaces are needed", "indent with spaces"
        elif isinstance(error, yaml.composer.ComposerError) and "document" in str(error):
            problem, fix = "a second document begins", "keep one document, without ---"
    return Fault(f"{label}:{line}" if line else label, problem, fix)


def read_yaml(text: str, label: str, *, multiline: bool = False) -> Reading:
    """Return the content of a YAML text.

    label: name of the text in sources and faults.
    multiline: allow line breaks and tabs in values. Names and paths have none.
    """
    walk = _Walk(label, "\n\t" if multiline else "")
    loader = None
    value = None
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        value = None if node is None else walk.value(node, ())
    except yaml.YAMLError as error:
        walk.faults.append(_syntax_fault(error, text, label))
    except (_TooBig, RecursionError):
        fix = f"at most {MOST_VALUES} values and {LARGEST_DEPTH} levels, aliases written out"
        walk.faults.append(Fault(label, "is too big or nested too deep", fix))
    finally:
        if loader is not None:
            loader.dispose()
    return Reading(value, walk.sources, tuple(walk.faults))


def read_mapping(text: str, label: str, *, multiline: bool = False) -> Reading:
    """Return the content of a YAML text, as `read_yaml`, with a fault unless it is a mapping."""
    reading = read_yaml(text, label, multiline=multiline)
    if isinstance(reading.value, dict):
        return reading
    faults = reading.faults
    if not faults and reading.value is None:
        faults = (Fault(label, "is empty", "write at least its required keys"),)
    elif not faults:
        found = f"holds {shown(reading.value)} at the top level"
        faults = (Fault(label, found, "write keys with values, such as `model: NAME`"),)
    return Reading({}, reading.sources, faults)


def header_of(text: str) -> str:
    """Return the comment lines at the very top of a text, without their `#`."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" ").rstrip())
    return "\n".join(lines)


def label_of(path: Path) -> str:
    """Return a path on one line, for messages."""
    return as_label(str(path))


def read_text(path: Path) -> tuple[str, tuple[Fault, ...]]:
    """Return the text of a small UTF-8 file, or "" and why it cannot be read."""
    label = label_of(path)
    try:
        if path.is_dir():
            return "", (Fault(label, "is a folder", "name a YAML file"),)
        if not path.exists():
            return "", (Fault(label, "does not exist", "check the path"),)
        if not path.is_file():
            return "", (Fault(label, "is not a regular file", "name a YAML file"),)
        size_bytes = path.stat().st_size
        if size_bytes > LARGEST_FILE_BYTES:
            return "", (
                Fault(label, f"has {format_bytes(size_bytes)}", "a YAML file has at most 1 MB"),
            )
        return path.read_bytes().decode("utf-8-sig"), ()
    except UnicodeDecodeError as error:
        found = f"is not UTF-8 text (byte {error.start})"
        return "", (Fault(label, found, "save it as UTF-8"),)
    except (OSError, ValueError) as error:
        return "", (Fault(label, f"cannot be read ({error})", "check the path"),)
