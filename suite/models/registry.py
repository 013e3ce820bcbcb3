"""The registry of model families: a name, a configuration class, and the modules that the transformer contains.

The transformer knows the points at which modules enter and nothing else about a family. One call of `register` adds a
family; its configuration class lists the fields that a cell may set.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from suite.models.attachments import Attachments, validated
from suite.models.sizes import SIZES, Size

Problem = tuple[str, object, str]
"""An invalid field: its name, its value, and the allowed values."""


class ModelConfig(BaseModel):
    """The model options of every family; a family adds its own in a subclass.

    `family` is a name in the registry and `base` a name in `sizes.SIZES`. Shape fields that are None take the value of
    the base.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    family: str = Field(description="kind of model (suite baselines)")
    base: str = Field(description="named shape that the other fields start from, e.g. w32 or 134m")
    tie_embeddings: bool = Field(default=False, description="use the embedding as the output head")
    layers: int | None = Field(default=None, gt=0, description="blocks; None: the base's")
    dim: int | None = Field(default=None, gt=0, description="model width; None: the base's")
    heads: int | None = Field(default=None, gt=0, description="attention heads; None: the base's")
    kv_heads: int | None = Field(default=None, gt=0, description="key and value heads; None: the base's")
    ffn_hidden: int | None = Field(default=None, gt=0, description="SwiGLU width; None: the base's")

    @property
    def size(self) -> Size:
        """The shape of the base with the overrides of this configuration (KeyError for an unknown base)."""
        fields = ("layers", "dim", "heads", "kv_heads", "ffn_hidden")
        overrides = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        return replace(SIZES[self.base], **overrides)

    @property
    def table_side(self) -> int | None:
        """Side n of a product-key table of n*n rows: the option `half_keys`; None for a family without it."""
        return getattr(self, "half_keys", None)

    @property
    def value_lr_ratio(self) -> float:
        """Learning rate of value tables over the base rate, where train.value_lr is None (released template)."""
        return 10.0

    @property
    def value_lr_end(self) -> float:
        """Factor on the rate of value tables at the end of a run, where train.value_lr_end is None."""
        return 1.0

    @property
    def default_value_weight_decay(self) -> float | None:
        """Weight decay of value tables where train.value_weight_decay is None; None: train.weight_decay."""
        return None

    @property
    def has_tables(self) -> bool:
        """Whether the model has value tables."""
        return family(self.family).has_memory

    @property
    def batch_statistics(self) -> bool:
        """Whether a layer uses statistics of the micro-batch, so that the size of a micro-batch changes the result."""
        return False

    def dense(self) -> ModelConfig:
        """Return the dense model of the same shape, with the feed-forward width of the base."""
        shape = ("base", "tie_embeddings", "layers", "dim", "heads", "kv_heads")
        return ModelConfig(family="dense", **{name: getattr(self, name) for name in shape})

    def problems(self) -> list[Problem]:
        """Return what is wrong across fields, starting with base and shape.

        A family overrides `family_problems` instead, which is called only if base and shape are valid.
        """
        if self.base not in SIZES:
            return [("base", self.base, ", ".join(SIZES))]
        size = self.size
        if size.dim % (2 * size.heads):
            return [("dim", size.dim, f"a multiple of 2 * heads = {2 * size.heads} (rotary heads are even)")]
        if size.heads % size.kv_heads:
            return [("kv_heads", size.kv_heads, f"a divisor of heads ({size.heads})")]
        return self.family_problems()

    def vocabulary_problems(self, vocab_size: int) -> list[Problem]:
        """Return what is wrong with the options for a vocabulary of that size; called only if all else is valid."""
        return []

    def family_problems(self) -> list[Problem]:
        """Return what is wrong with a family's own options; called only if base and shape are valid."""
        return []


def placement_problems(stated: Sequence[int] | None, placement: Sequence[int], layers: int) -> list[Problem]:
    """Return what is wrong with a placement: it holds increasing layer numbers, at least one.

    Args:
        stated: The field; None: the family's default is used.
        placement: The layers.
        layers: Of the model.
    """
    if placement and sorted(set(placement)) == list(placement) and placement[0] >= 0 and placement[-1] < layers:
        return []
    allowed = f"increasing layer numbers from 0 to {layers - 1}"
    if stated is None:
        allowed += " (it is the default of the family, for deeper models: state another)"
    return [("placement", tuple(placement), allowed)]


@dataclass(frozen=True)
class Family:
    """A registered family.

    Attributes:
        name: The family's name, a Python identifier.
        config: The configuration class.
        feed_forwards: Called with a configuration; returns one feed-forward per layer or, for modules at other points,
            `Attachments`. Each module has `forward(x_BTD) -> y_BTD` and `cost() -> Cost`. It may have `after_step()`,
            called after each optimizer step, and `initial_values(name, shape)` or `init_parameter(name, parameter,
            generator)`, which replace the default initial values (see `initial_weights.initialise`). Its `forward`
            receives as further arguments, in this order, what it requests: with `window`, the ids of each token and its
            window - 1 predecessors, `ids_BTW`, int64, -1 where the document has none; with `reads_embedding`, the token
            embedding, `embedding_BTD`; with `reads_earlier`, a function that returns its own rows of earlier tokens
            (`cache.Earlier`). A factory with a second required parameter also receives the size of the vocabulary.
        has_memory: Whether the family has value tables.
        source: sha256 of the file of an external family; None for a built-in one.
        path: That file.
    """

    name: str
    config: type[ModelConfig]
    feed_forwards: Callable[..., list[nn.Module] | Attachments]
    has_memory: bool = False
    source: str | None = None
    path: Path | None = None

    def modules(self, config: ModelConfig, vocab_size: int) -> Attachments:
        """Return the modules of a model. Raises ValueError if they are not what `feed_forwards` may return."""
        parameters = inspect.signature(self.feed_forwards).parameters.values()
        required = [parameter for parameter in parameters if parameter.default is parameter.empty]
        return validated(self.feed_forwards(*(config, vocab_size)[: len(required)]), config.size.layers)


_FAMILIES: dict[str, Family] = {}


def register(new: Family) -> Family:
    """Add a family and return it. Raises ValueError if the name is taken or an attribute is invalid."""
    if not (isinstance(new.name, str) and new.name.isidentifier()):
        raise ValueError(f"name: got {new.name!r}, allowed: letters, digits and _, e.g. my_model")
    if not (isinstance(new.config, type) and issubclass(new.config, ModelConfig)):
        raise ValueError(f"config: got {new.config!r}, allowed: a subclass of ModelConfig")
    if not callable(new.feed_forwards):
        raise ValueError(f"feed_forwards: got {new.feed_forwards!r}, allowed: config -> one module per layer")
    if new.name in _FAMILIES:
        raise ValueError(f"family {new.name!r} is already registered; choose another name")
    _FAMILIES[new.name] = new
    return new


def unregister(names: Iterable[str]) -> None:
    """Remove families from the registry."""
    for name in list(names):
        del _FAMILIES[name]


def set_origin(name: str, source: str, path: Path) -> None:
    """Record the origin of an external family.

    Args:
        name: The family.
        source: The sha256 of its file's content.
        path: The file.
    """
    _FAMILIES[name] = replace(_FAMILIES[name], source=source, path=path)


def family(name: object) -> Family:
    """Return the family of that name. Raises ValueError, which lists the registered names."""
    if not isinstance(name, str) or name not in _FAMILIES:
        raise ValueError(f"family: got {name!r}, allowed: {', '.join(sorted(_FAMILIES))}")
    return _FAMILIES[name]


def families() -> list[str]:
    """Return the names of all registered families, sorted."""
    return sorted(_FAMILIES)
