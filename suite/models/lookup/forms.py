"""The options that n-gram families share: a published form sets the defaults of options that are None."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from suite.models.lookup.controls import TableConfig


class NgramConfig(TableConfig):
    """The base of the configurations of n-gram families, which define `forms`, `form` and `rows_read`."""

    forms: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    form: str
    row_width: int | None = Field(
        default=None,
        gt=0,
        description="width of a row; None: all rows of a token together are as wide as the model, or 8",
    )
    max_order: int | None = Field(
        default=None, ge=2, description="highest order N of the n-grams 2..N; None: the form's"
    )

    def option(self, name: str) -> Any:
        """Return an option, or the form's value where it is None."""
        value = getattr(self, name)
        return self.forms[self.form][name] if value is None else value

    @property
    def rows_read(self) -> int:
        """Rows that a token reads from a table (H): those of all orders."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Width of a row."""
        return self.row_width or max(8, self.size.dim // self.rows_read)
