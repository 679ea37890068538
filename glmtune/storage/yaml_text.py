"""Read YAML within bounds: what a few lines may expand to, how deep and how large it is.

An alias stands for a whole part of the file. Ten lines of ten aliases each stand for 10**10 values; they take
no time to read, as all are one object, and no machine has the memory for whoever walks or copies them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 4 << 20
"""Of a file; settings have a few thousand, and 4 MiB take a minute to read."""
MAX_DEPTH = 64
MAX_ALIASED_VALUES = 10_000
"""What all aliases of a file may add to what is written out in it."""
MAX_INTEGER_BITS = 256


class YamlTooLarge(yaml.YAMLError):
    """The text goes beyond a bound, which is named."""


class _Loader(yaml.SafeLoader):
    """yaml's safe loader, with integers that can be printed."""


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    value = loader.construct_yaml_int(node)
    if value.bit_length() > MAX_INTEGER_BITS:
        problem = f"an integer of {value.bit_length()} bits, but at most {MAX_INTEGER_BITS} are read"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values (no Python objects).

    Args:
        path: the file, UTF-8.

    Returns:
        Its one document; None where it is empty.

    Raises:
        OSError: it cannot be read.
        yaml.YAMLError: it is no YAML, or (`YamlTooLarge`) goes beyond a bound.
    """
    return load_yaml(read_text(path))


def read_text(path: Path) -> str:
    """Read the text of a YAML file; see `read_yaml`, also for errors."""
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)  # a device has no size to ask for
    if len(content) > MAX_BYTES:
        raise YamlTooLarge(f"it is larger than {MAX_BYTES // 2**20} MiB, the most that is read as YAML")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(f"it is not UTF-8 (byte {error.start})") from None


def load_yaml(text: str) -> Any:
    """Turn YAML text into plain values.

    Args:
        text: one document.

    Returns:
        Its values; None where there is none.

    Raises:
        yaml.YAMLError: it is no YAML, or (`YamlTooLarge`) goes beyond a bound.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_expansion(node)
        return loader.construct_document(node)
    except RecursionError:
        raise YamlTooLarge(f"values are nested more than {MAX_DEPTH} deep") from None
    except (ValueError, OverflowError) as error:  # integers of thousands of digits, the 99th of a month
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _check_expansion(root: yaml.Node) -> None:
    """Refuse a document that grows too far, or contains itself, once aliases are followed.

    Each node is visited once, children first: its size and depth follow from theirs.
    """
    sizes: dict[int, tuple[int, int]] = {}
    entered: set[int] = set()
    pending = [(root, False)]
    while pending:
        node, children_done = pending.pop()
        if children_done:
            found = [sizes[id(child)] for child in _children(node)]
            size, depth = (
                1 + sum(size for size, _ in found),
                1 + max((depth for _, depth in found), default=0),
            )
            sizes[id(node)] = size, depth
            if depth > MAX_DEPTH:
                raise _refusal(node, f"values are nested more than {MAX_DEPTH} deep")
            if size > len(entered) + MAX_ALIASED_VALUES:
                raise _refusal(node, f"aliases stand for more than {MAX_ALIASED_VALUES} values")
        elif id(node) not in sizes:
            if id(node) in entered:
                raise _refusal(node, "an alias stands for a part that contains it")
            entered.add(id(node))
            pending.append((node, True))
            pending += [(child, False) for child in _children(node) if id(child) not in sizes]


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _refusal(node: yaml.Node, problem: str) -> YamlTooLarge:
    return YamlTooLarge(f"{problem} (line {node.start_mark.line + 1})")
