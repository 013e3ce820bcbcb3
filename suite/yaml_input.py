"""Reading the YAML that users write, and turning errors in it into one line."""

from __future__ import annotations

import difflib
import itertools
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from suite.errors import UserError, allowed_by, reason
from suite.identity import Frozen
from suite.models import registry

SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+|[-+]?[0-9][0-9_]*\.[0-9_]*"
        r"|[-+]?\.[0-9][0-9_]*|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    "merge": (r"<<", ["<"]),
}
"""The scalars of YAML 1.2 that are not text: tag -> pattern and first characters. Digits may be grouped by `_`."""


MERGE = "tag:yaml.org,2002:merge"
MAX_BYTES = 10_000_000
"""Size of the largest file that is parsed, which takes about a minute; a larger one is data, not a configuration."""
MAX_VALUES = 1_000_000

WRONG_LENGTH = ("missing", "too_long", "tuple_type")
"""Pydantic's types of errors for a value that is not a list of the fixed length of its field."""


class _Loader(yaml.SafeLoader):
    """A SafeLoader that reads scalars as YAML 1.2 does, and refuses duplicate keys and aliases without an end.

    YAML 1.1 reads 12:00:00 as a number in base 60, 0123 as octal, `no` as false, 2024-01-01 as a date, and 1e9 as text.
    A float without a fraction, such as 1e9, becomes an integer, which fields of either type accept.
    """

    def get_single_node(self) -> yaml.Node | None:
        """Return the document, or None if it is empty. Raises UserError for aliases that no file needs."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return a mapping as it is written, before merges add keys to it. Raises UserError for a duplicate key."""
        node = super().compose_mapping_node(anchor)
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name = key.value if key.tag == MERGE else self.construct_object(key)
                if name in seen:
                    raise UserError(f"line {key.start_mark.line + 1}: {name}: given twice; remove one")
                seen.add(name)
        return node

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        """Return the integer of a scalar in base 8, 10 or 16. Raises UserError for more digits than Python reads."""
        text = str(node.value)
        try:
            return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
        except ValueError as error:
            raise UserError(f"line {node.start_mark.line + 1}: not valid YAML: {reason(error)}") from None

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Return the number of a scalar, as an integer if it has no fraction."""
        number = self.construct_yaml_float(node)
        return int(number) if number.is_integer() else number


def _count(node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
    """Return the number of values of a node, in which an alias stands for all values that it repeats.

    Args:
        node: The node.
        counts: The counts of the nodes that are counted; 0 for one that is being counted.

    Raises:
        UserError: An alias stands within what it repeats, or the count passes MAX_VALUES.
    """
    line = f"line {node.start_mark.line + 1}: "
    if node not in counts:
        counts[node] = 0
        parts = itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
        counts[node] = 1 + sum(_count(part, counts) for part in parts if isinstance(part, yaml.Node))
    if not counts[node]:
        raise UserError(f"{line}contains itself through an alias; write the value without the alias")
    if counts[node] > MAX_VALUES:
        raise UserError(f"{line}holds more than {MAX_VALUES:,} values, repetitions by aliases included; use fewer")
    return counts[node]


_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML or JSON file. Raises UserError with the file, and the line of a syntax error."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UserError(f"{path}: has {size:,} bytes, allowed: a YAML file of at most {MAX_BYTES:,}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fault = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: {fault}; give a readable YAML file in UTF-8") from None
    content = _parse(text, str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path}: got {shown(content)}, allowed: a mapping of fields to values")
    return content


def parse_value(text: str, where: str) -> Any:
    """Parse a YAML value of the command line. Raises UserError, which names the option `where`."""
    return _parse(text, where)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        hint = "; use spaces" if "'\\t'" in str(error.problem) else ""
        raise UserError(f"{where}: {line}not valid YAML: {error.problem}{hint}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: its values are nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {reason(error)}") from None


def whole_numbers(text: str, where: str) -> list[int]:
    """Parse `1,8,64` into whole numbers above 0. Raises UserError, which names the option `where`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{where}: got {text!r}, allowed: whole numbers above 0, separated by commas, e.g. 1,8,64")
    return [int(part) for part in parts]


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Return `, did you mean X?` for the closest of the names, or an empty string."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f", did you mean {close[0]}?" if close else ""


def explain(error: ValidationError, schema: type[BaseModel], content: Any) -> str:
    """Describe the first error of a validation in one line: `field: got value, allowed: what`.

    Args:
        error: The error that pydantic raised.
        schema: The model that was validated.
        content: The nested mapping that the user wrote.
    """
    return _explain(error.errors()[0], schema, content)


def _explain(detail: ErrorDetails, schema: type[BaseModel], content: Any) -> str:
    inner = detail.get("ctx", {}).get("error")
    if isinstance(inner, ValidationError):
        # A part with a validator of its own (the options of the model): report the error within it.
        nested = inner.errors()[0]
        return _explain({**nested, "loc": (*detail["loc"], *nested["loc"])}, schema, content)
    path, part = _locate(detail["loc"], schema, content)
    field = ".".join(path)
    if detail["type"] == "extra_forbidden":
        names = [] if part is None else list(part.model_fields)
        return f"{field}: unknown field{did_you_mean(path[-1], names)}, allowed: {', '.join(names)}"
    if (count := _fixed_length(part, detail["loc"])) is not None and detail["type"] in WRONG_LENGTH:
        return f"{field.partition('[')[0]}: got {shown(detail['input'])}, allowed: a list of {count} values"
    if detail["type"] == "missing":
        return f"{field}: got nothing, allowed: {_wanted(part, path[-1])}"
    if detail["type"] == "unknown_kind":
        kind, allowed = detail["ctx"]["given"], detail["ctx"]["kinds"]
        actual = "nothing" if kind is None else f"{kind!r}{did_you_mean(kind, allowed)}"
        return f"{field}.kind: got {actual}, allowed: {', '.join(allowed)}"
    if inner is not None:
        # Validators of this project already name the field, the value and what is allowed.
        own = str(inner)
        return own if not field or own.startswith(field) else f"{field}.{own}"
    return f"{field}: got {shown(detail['input'])}, allowed: {allowed_by(detail['msg'])}"


def _locate(
    loc: tuple[int | str, ...], schema: type[BaseModel], content: Any
) -> tuple[list[str], type[BaseModel] | None]:
    """Return the path of an error as the user writes it, and the model with its last field (None if unknown)."""
    path: list[str] = []
    holder: type[BaseModel] | None = None
    declared: type[BaseModel] | None = schema
    current: type[BaseModel] | None = schema
    value = content
    is_key = False  # the next step is a key of a mapping from names to models
    for step in loc:
        value = _item(value, step)
        if is_key:
            path.append(str(step))
            is_key = False
        elif isinstance(step, int):
            path[-1] += f"[{step + 1}]"
        else:
            holder = current
            path.append(step)
            field = holder.model_fields.get(step) if holder else None
            declared = next(iter(models_in(field.annotation)), None) if field else None
            is_key = field is not None and typing.get_origin(field.annotation) is dict
        current = _class_for(declared, value)
    return path, holder


def _item(value: Any, step: int | str) -> Any:
    """Return an element of a mapping or list, or None if there is none."""
    if isinstance(value, dict):
        return value.get(step)
    return value[step] if isinstance(value, list | tuple) and isinstance(step, int) and step < len(value) else None


def _class_for(declared: type[BaseModel] | None, value: Any) -> type[BaseModel] | None:
    """Return the class that validates `value`: the declared one, or the one that its family or kind selects."""
    if declared is registry.ModelConfig:
        family = value.get("family") if isinstance(value, dict) else None
        return registry.family(family).config if family in registry.families() else None
    if declared is None or not issubclass(declared, Frozen) or not declared.variants():
        return declared
    return declared.variants().get(str(value.get("kind"))) if isinstance(value, dict) else None


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the pydantic models in an annotation such as `A | B` or `tuple[A, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def _fixed_length(part: type[BaseModel] | None, loc: tuple[int | str, ...]) -> int | None:
    """Return the number of values of the field with an error, if it is a list of fixed length."""
    name = next((step for step in reversed(loc) if isinstance(step, str)), "")
    field = part.model_fields.get(name) if part else None
    if field is None or typing.get_origin(field.annotation) is not tuple:
        return None
    items = typing.get_args(field.annotation)
    return None if Ellipsis in items else len(items)


def _wanted(part: type[BaseModel] | None, name: str) -> str:
    field = part.model_fields.get(name) if part else None
    if field is not None and typing.get_origin(field.annotation) is typing.Literal:
        return ", ".join(map(str, typing.get_args(field.annotation)))
    return (field and field.description) or "a value (this field has no default)"


def shown(value: object) -> str:
    """Return a value for a message, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
