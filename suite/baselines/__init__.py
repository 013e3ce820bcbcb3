"""What a baseline's file imports: registering a family, its configuration, its cost, and the parts to build it from."""

from suite.models.attachments import Attachments, Skip
from suite.models.cache import Earlier
from suite.models.cost import Cost, dense_cost
from suite.models.distributions import Constant, Normal, Uniform
from suite.models.feedforward import SwiGLU
from suite.models.lookup.controls import TableConfig
from suite.models.memory_table import MemoryLayer, MemoryTable
from suite.models.registry import Family, ModelConfig, Problem, register

__all__ = [
    "Attachments",
    "Constant",
    "Cost",
    "Earlier",
    "Family",
    "MemoryLayer",
    "MemoryTable",
    "ModelConfig",
    "Normal",
    "Problem",
    "Skip",
    "SwiGLU",
    "TableConfig",
    "Uniform",
    "dense_cost",
    "register",
]
