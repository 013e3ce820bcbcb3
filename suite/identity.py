"""Frozen configuration blocks, and the fields of a block that identify what it makes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

NOT_IDENTITY: dict[str, Any] = {"identity": False}
"""`json_schema_extra` of a field that may change without changing what the block makes."""

Problem = tuple[str, object, str]
"""(field, value, what is allowed)"""


class Frozen(BaseModel):
    """A block that is immutable, strictly typed, and refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def variants(cls) -> Mapping[str, type[Frozen]]:
        """Return the classes that a field declared as this class may hold, by their `kind`; empty if only this one."""
        return {}

    def problems(self) -> list[Problem]:
        """Return errors that involve several fields."""
        return []


def identity(part: BaseModel, current_names: bool = False) -> dict[str, Any]:
    """Return the settings that enter the hash: fields that differ from their default and are not marked NOT_IDENTITY.

    Args:
        part: A cell or a block of one.
        current_names: Use today's field names. By default a renamed field keeps the name under which it was first
            hashed (`identity_name`), so that renaming a field changes no hash.

    Returns:
        Nested settings by name.
    """
    settings: dict[str, Any] = {}
    for name, hashed_name, default in _identity_fields(type(part)):
        value = getattr(part, name)
        if value != default:
            settings[name if current_names else hashed_name] = _identity_of(value, current_names)
    return settings


@functools.cache
def _identity_fields(block: type[BaseModel]) -> list[tuple[str, str, Any]]:
    """Return the fields of a block that may enter the hash: name, name in the hash, and default."""
    fields = []
    for name, info in block.model_fields.items():
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        if extra.get("identity") is not False:
            fields.append((name, str(extra.get("identity_name", name)), info.default))
    return fields


def _identity_of(value: Any, current_names: bool) -> Any:
    if isinstance(value, BaseModel):
        return identity(value, current_names)
    if isinstance(value, dict):
        return {name: _identity_of(part, current_names) for name, part in value.items()}
    return value
