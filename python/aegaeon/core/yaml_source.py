"""A YAML document as plain data, with the line of every key, and `${env.NAME}` replaced.

Reads what PyYAML's safe loader reads, minus duplicate keys, which YAML forbids and PyYAML accepts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from . import envs
from .errors import ConfigError

KeyPath = tuple[str | int, ...]

_REFERENCE = re.compile(r"\$\{env\.([^}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass
class YamlSource:
    """The data of one file, and where each key and list item stands in it."""

    path: Path
    data: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def where(self, key_path: KeyPath) -> str:
        """'pool.yaml:12' for a key, or for the nearest key around it."""
        for end in range(len(key_path), -1, -1):
            if key_path[:end] in self.lines:
                return f"{self.path}:{self.lines[key_path[:end]]}"
        return str(self.path)


def read_yaml(path: Path) -> YamlSource:
    """Raises ConfigError, with the line where there is one, for what is unreadable or not YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    try:
        return _parse(path, text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        column = "" if mark is None else f" (column {mark.column + 1})"
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}{column}") from None
    except yaml.reader.ReaderError as error:
        place = f"character {error.position + 1}"
        raise ConfigError(f"{path}: not valid YAML: {error.reason} at {place}") from None


def _parse(path: Path, text: str) -> YamlSource:
    source = YamlSource(path, None)
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is not None:
            _visit(loader, source, root, (), frozenset())
            source.data = loader.construct_document(root)
    finally:
        loader.dispose()
    return source


def _visit(
    loader: yaml.SafeLoader,
    source: YamlSource,
    node: yaml.Node,
    key_path: KeyPath,
    around: frozenset[int],
) -> None:
    """Note the lines, refuse duplicate keys and endless aliases, and substitute the environment."""
    source.lines.setdefault(key_path, node.start_mark.line + 1)
    if id(node) in around:
        raise ConfigError(f"{source.where(key_path)}: {spell(key_path)}: an alias contains itself")
    around = around | {id(node)}
    if isinstance(node, yaml.ScalarNode):
        _substitute(loader, source, node, key_path)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _visit(loader, source, item, (*key_path, index), around)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key = str(key_node.value)
            child = (*key_path, key)
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            line = key_node.start_mark.line + 1
            if key in seen:
                raise ConfigError(f"{source.path}:{line}: {spell(child)}: the key is given twice")
            seen.add(key)
            source.lines[child] = line
            _visit(loader, source, value_node, child, around)


def _substitute(
    loader: yaml.SafeLoader, source: YamlSource, node: yaml.ScalarNode, key_path: KeyPath
) -> None:
    if "${env." not in node.value:
        return

    def value_of(match: re.Match[str]) -> str:
        name = match[1]
        value = envs.lookup(name) if _NAME.fullmatch(name) else None
        if value is None:
            raise ConfigError(
                f"{source.where(key_path)}: {spell(key_path)}: got {match[0]!r}; "
                f"expected the name of an environment variable that is set"
            )
        return value

    node.value = _REFERENCE.sub(value_of, node.value)
    if node.style is None:  # unquoted: `port: ${env.PORT}` is to be a number
        node.tag = loader.resolve(yaml.ScalarNode, node.value, (True, False))  # type: ignore[no-untyped-call]


def spell(key_path: KeyPath) -> str:
    """('models', 0, 'slo') -> 'models[0].slo'; the whole document is 'the file'."""
    text = ""
    for part in key_path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the file"
