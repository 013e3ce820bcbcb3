"""Laws written as formulas: `L = E + (A*N**-a + B*D**-b)**k`.

A formula is parsed into Python's syntax tree, of which only arithmetic, numbers, names and a few functions are
allowed, and is evaluated by walking that tree. On dual numbers this gives exact derivatives; nothing is ever executed
as Python.
"""

from __future__ import annotations

import ast
import keyword
import math
import operator
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from analysis.errors import InputError
from analysis.laws import autodiff
from analysis.laws.law import Inputs, Law, Parameter, Values
from analysis.laws.parameter_text import Spec, specs

LONGEST = 2000
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "exp": autodiff.exp,
    "expm1": autodiff.expm1,
    "log": autodiff.log,
    "ln": autodiff.log,
    "log1p": autodiff.log1p,
    "sqrt": lambda x: x**0.5,
    "softplus": autodiff.softplus,
    "sigmoid": lambda x: autodiff.exp(-autodiff.softplus(-x)),
}
PAIRS: dict[str, Callable[[Any, Any], Any]] = {"min": autodiff.minimum, "max": autodiff.maximum}
ALLOWED = f"numbers, names, + - * / ** ^ ( ), {', '.join([*FUNCTIONS, *PAIRS])}"
WIDE = (1e-2, 1e2)
"""Range of starts of a scale, in units in which its term is 1 at the middle of the data."""
SIGNED = (-2.0, 2.0)


def parse(text: str, option: str) -> ast.expr:
    """Return the syntax tree of a formula's right-hand side; InputError if it holds anything but arithmetic."""
    if len(text) > LONGEST:
        raise InputError(f"{option}: {len(text)} characters, allowed: {LONGEST}")
    try:
        tree = ast.parse(text.replace("^", "**").strip(), mode="eval").body
        _check(tree, text, option)
    except SyntaxError as error:
        reserved = next((word for word in re.findall(r"[^\W\d]\w*", text) if keyword.iskeyword(word)), None)
        if reserved is not None:
            raise InputError(
                f"{option}: got the reserved name {reserved!r}, allowed: another, as {reserved}_"
            ) from None
        raise InputError(f"{option}: {text.strip()!r} is not a formula: {error.msg}") from None
    except (RecursionError, MemoryError, ValueError):
        raise InputError(f"{option}: the formula is nested too deeply or is not text") from None
    return tree


def _check(tree: ast.expr, text: str, option: str) -> None:
    """Check that there is only arithmetic, numbers, names and the functions above."""
    match tree:
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            _check(left, text, option)
            _check(right, text, option)
        case ast.UnaryOp(ast.USub() | ast.UAdd(), operand):
            _check(operand, text, option)
        case ast.Call(ast.Name(name), [only], []) if name in FUNCTIONS:
            _check(only, text, option)
        case ast.Call(ast.Name(name), [first, second], []) if name in PAIRS:
            _check(first, text, option)
            _check(second, text, option)
        case ast.Name():
            pass
        case ast.Constant(value) if type(value) in (int, float):
            pass
        case _:
            raise InputError(f"{option}: got {ast.unparse(tree)!r} in {text.strip()!r}, allowed: {ALLOWED}")


def evaluate(tree: ast.expr, values: Mapping[str, Any]) -> Any:
    """Return the value of a checked tree: an array, or a dual number where a value is one."""
    match tree:
        case ast.BinOp(left, op, right):
            return OPERATORS[type(op)](evaluate(left, values), evaluate(right, values))
        case ast.UnaryOp(op, operand):
            return -evaluate(operand, values) if isinstance(op, ast.USub) else evaluate(operand, values)
        case ast.Call(ast.Name(name), [only]):
            return FUNCTIONS[name](evaluate(only, values))
        case ast.Call(ast.Name(name), [first, second]):
            return PAIRS[name](evaluate(first, values), evaluate(second, values))
        case ast.Name(name):
            return values[name]
        case ast.Constant(value):
            return np.float64(value)  # type: ignore[arg-type]
    raise AssertionError(ast.dump(tree))


def names(tree: ast.expr) -> list[str]:
    """Return the names of parameters and inputs in a tree, in their order."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    ordered = sorted(nodes, key=lambda node: (node.lineno, node.col_offset))
    return list(dict.fromkeys(node.id for node in ordered if id(node) not in functions))


def degree(tree: ast.expr, of: set[str]) -> float:
    """Return the degree of a tree as a polynomial in the named parameters together; infinite where it is none."""
    match tree:
        case ast.BinOp(left, op, right):
            first, second = degree(left, of), degree(right, of)
            if isinstance(op, ast.Add | ast.Sub):
                return max(first, second)
            if isinstance(op, ast.Mult):
                return first + second
            if isinstance(op, ast.Div):
                return first if second == 0 else math.inf
            return 0 if first == second == 0 else math.inf
        case ast.UnaryOp(_, operand):
            return degree(operand, of)
        case ast.Call(_, arguments):
            return 0 if all(degree(argument, of) == 0 for argument in arguments) else math.inf
        case ast.Name(name):
            return float(name in of)
    return 0


def formula_law(
    text: str,
    columns: Sequence[str],
    parameters: str | Mapping[str, str] = "",
    *,
    name: str = "formula",
    source: str = "a formula",
    residuals: str | None = None,
    meaning: Mapping[str, str] | None = None,
    option: str = "--formula",
) -> Law:
    """Return a law from its formula.

    Args:
        text: `OUTPUT = EXPRESSION`, or the expression alone where one column is not in it.
        columns: Names of the columns; names in the formula that are not columns are parameters.
        parameters: Bounds, ties and starts, as `E >= 0, k free, 0 <= s <= 1, beta = alpha, a ~ 0.1..1`; above 0 where
            nothing is stated.
        name: The law's name.
        source: Where the law is from.
        residuals: `log` or `linear`; by default logarithms.
        meaning: Meaning by parameter or input.
        option: What to name in an error.

    Raises:
        InputError: The formula or the parameters cannot be read.
    """
    left, equals, right = text.rpartition("=")
    tree = parse(right, option)
    output = left.strip() if equals else _only_other(names(tree), columns, option)
    if not output.isidentifier():
        raise InputError(f"{option}: {left.strip()!r} is not a name, as in 'L = E + A*N**-a'")
    columns = [unicodedata.normalize("NFKC", key) for key in columns]  # as Python's parser reads names
    stated = specs(parameters)
    ties = {key: parse(spec.tie, f"--parameters: {key}") for key, spec in stated.items() if spec.tie is not None}
    _check_ties(tree, ties, columns)
    tree = _tied(tree, ties)
    inputs = [key for key in names(tree) if key in columns and key != output]
    free = [key for key in names(tree) if key not in inputs]
    _check_names(free, inputs, output, stated, ties, option)
    meaning = meaning or {}
    linear: set[str] = set()
    for key in free:
        if degree(tree, linear | {key}) <= 1 and (key not in stated or stated[key].start is None):
            linear.add(key)
    exponents = {key for key in free if _bases(tree, key)}
    entries = tuple(
        replace(
            _parameter(key, stated.get(key, Spec()), key in linear, tree, set(free), key in exponents),
            meaning=meaning.get(key) or _role(tree, key, set(free), output),
        )
        for key in free
    )
    scales = [p.name for p in entries if not p.linear and p.name not in exponents and p.start == WIDE]
    return Law(
        name,
        f"{output} = {ast.unparse(tree).replace('**', '^')}",
        source,
        {key: meaning.get(key, "input") for key in inputs},
        output,
        entries,
        lambda values, x: evaluate(tree, {**x, **values}),
        _size,
        residuals="linear" if residuals == "linear" else "log",
        any_sign=frozenset(inputs),
        constant_allowed=frozenset(inputs),
        units=lambda values, x: _units(tree, scales, values, x),
        scales=frozenset(scales),
    )


def _only_other(used: Sequence[str], columns: Sequence[str], option: str) -> str:
    others = [key for key in columns if key not in used]
    if len(others) != 1:
        raise InputError(f"{option}: name the outcome on the left, as in 'L = E + A*N**-a'")
    return others[0]


def _check_names(
    free: list[str],
    inputs: list[str],
    output: str,
    stated: Mapping[str, Spec],
    ties: Mapping[str, ast.expr],
    option: str,
) -> None:
    if output in free or output in inputs:
        raise InputError(f"{option}: the outcome {output} also occurs on the right")
    if not inputs:
        raise InputError(f"{option}: no name of --columns is in the formula")
    if not free:
        raise InputError(f"{option}: the formula has no parameter")
    unknown = [key for key in stated if key not in free and key not in ties]
    if unknown:
        raise InputError(f"--parameters: got {unknown[0]!r}, allowed: {', '.join(free)}")


def _check_ties(tree: ast.expr, ties: Mapping[str, ast.expr], columns: Sequence[str]) -> None:
    """Check that what is tied are parameters of the formula, or of another tie."""
    used = {key for part in (tree, *ties.values()) for key in names(part)}
    for key in ties:
        if key in columns or key not in used:
            allowed = ", ".join(sorted(used - set(columns)))
            raise InputError(f"--parameters: got {key!r}, allowed: {allowed}")


def _tied(tree: ast.expr, ties: Mapping[str, ast.expr]) -> ast.expr:
    """Return the tree with every tied parameter replaced by its expression."""

    class Replace(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return ties.get(node.id, node)

    for _ in range(len(ties)):  # a tie may name another tied parameter
        if not set(names(tree)) & ties.keys():
            break
        tree = ast.fix_missing_locations(Replace().visit(ast.parse(ast.unparse(tree), mode="eval").body))
    circular = set(names(tree)) & ties.keys()
    if circular:
        raise InputError(f"--parameters: {sorted(circular)[0]} is tied to itself")
    return ast.parse(ast.unparse(tree), mode="eval").body


def _parameter(name: str, spec: Spec, linear: bool, tree: ast.expr, free: set[str], exponent: bool) -> Parameter:
    """Return a parameter with the scale it is fitted on and the range of its starts.

    An offset (multiplied only by numbers and inputs) may be 0; other parameters without bounds are above 0 and
    fitted by their logarithm.
    """
    low, high = spec.low, spec.high
    if low is None:
        low = 0.0
    is_offset = degree(tree, {name}) <= 1 and _is_offset(tree, name, free)
    closed = spec.closed or (spec.low is None and is_offset)
    log = (low == 0 and math.isinf(high) and not closed) or low > 0
    start = spec.start or _starts(low, high, log, exponent)
    if not low <= start[0] < start[1] <= high or (log and start[0] <= 0):
        words = "above 0" if log and low == 0 else f"from {low:g} to {high:g}"
        raise InputError(
            f"--parameters: {name}: got starts {start[0]:g}..{start[1]:g}, allowed: within its bounds, {words}"
        )
    at_bound = "the data show no offset" if is_offset and low == 0 else ""
    return Parameter(name, "", low, high, log, linear, start, at_bound)


def _starts(low: float, high: float, log: bool, exponent: bool) -> tuple[float, float]:
    """Return the range of starts of a parameter between bounds; one below a bound mirrors one above it."""
    if math.isinf(low) and math.isinf(high):
        return SIGNED
    if math.isinf(low):
        least, most = _starts(-high, math.inf, log, exponent)
        return -most, -least
    if math.isfinite(high):
        return (low, high) if log else (low + 0.05 * (high - low), high - 0.05 * (high - low))
    if exponent and low >= 0:
        return max(0.05, low), max(2.0, 4 * low)
    if low < 0:
        return low, low + 4 * max(1.0, -low)
    return (low * 1.01, low * 100) if low > 0 else WIDE


def _is_offset(tree: ast.expr, name: str, free: set[str]) -> bool:
    """Return whether the law's slope in a linear parameter depends on no parameter."""
    match tree:
        case ast.BinOp(left, op, right) if isinstance(op, ast.Add | ast.Sub):
            return all(_is_offset(part, name, free) for part in (left, right) if name in names(part))
        case ast.BinOp(left, _, right):
            inner, other = (left, right) if name in names(left) else (right, left)
            return not set(names(other)) & free and _is_offset(inner, name, free)
        case ast.UnaryOp(_, operand):
            return _is_offset(operand, name, free)
    return isinstance(tree, ast.Name)


def _bases(tree: ast.expr, name: str) -> list[str]:
    """Return what is raised to a power in which the parameter stands."""
    powers = (node for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow))
    return list(dict.fromkeys(ast.unparse(node.left) for node in powers if name in names(node.right)))


def _role(tree: ast.expr, name: str, free: set[str], output: str) -> str:
    """Return what a parameter is in the formula, where the user states no meaning."""
    if bases := _bases(tree, name):
        return f"exponent of {', '.join(base.replace('**', '^') for base in bases)}"
    if degree(tree, {name}) > 1:
        return ""
    return f"offset, units of {output}" if _is_offset(tree, name, free) else "coefficient"


def _size(x: Inputs) -> np.ndarray:
    """Return the product of the inputs that are positive throughout; the first input where none is."""
    positive = [values for values in x.values() if (values > 0).all()]
    return np.exp(sum(np.log(values) for values in positive)) if positive else next(iter(x.values()))


def _units(tree: ast.expr, scales: list[str], values: Values, x: Inputs) -> dict[str, np.ndarray]:
    """Return the value of each scale parameter at which it is as large as its neighbour in the formula.

    In A*N**-a, A is measured in units of N**a at the middle of the data; in N + s, s in units of N; in N/s likewise.
    """
    others = {name: np.ones((1, 1)) for name in names(tree)}  # those that are solved for have no value yet
    filled = {**others, **values, **x}
    units: dict[str, np.ndarray] = {}
    for name in scales:
        node = next(
            (item for item in ast.walk(tree) if isinstance(item, ast.BinOp) and _sibling(item, name) is not None), None
        )
        if node is None:
            continue
        other = _sibling(node, name)
        assert other is not None
        with np.errstate(all="ignore"):
            size = np.log(np.abs(np.asarray(evaluate(other, filled), float)))
        middle = np.exp(np.nan_to_num(np.median(np.atleast_2d(size), axis=-1), posinf=0.0, neginf=0.0))
        units[name] = 1 / middle if isinstance(node.op, ast.Mult) else middle
        filled[name] = units[name][:, None]
    return units


def _sibling(node: ast.BinOp, name: str) -> ast.expr | None:
    """Return the other operand where one is the bare parameter; none for powers."""
    if isinstance(node.op, ast.Pow):
        return None
    if isinstance(node.left, ast.Name) and node.left.id == name:
        return node.right
    return node.left if isinstance(node.right, ast.Name) and node.right.id == name else None
