"""What the source of a language model's forward does with its logits."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

_CRITERIA = ("CrossEntropyLoss", "nn.CrossEntropyLoss", "torch.nn.CrossEntropyLoss")
_OPTIONS = {"ignore_index", "label_smoothing", "reduction"}  # those of linear_cross_entropy
_SAME = ("contiguous", "float", "view")  # methods that return logits
_FACTS = ("device", "dtype", "shape", "size")  # known without the logits
_READABLE = (
    ast.Name, ast.Attribute, ast.Constant, ast.NamedExpr, ast.Compare, ast.UnaryOp, ast.BoolOp,
    ast.expr_context, ast.cmpop, ast.unaryop, ast.boolop,
)  # fmt: skip
_UNKNOWN, _CRITERION = object(), object()


def other_use(forward: Callable, module: nn.Module, head: str, *, has_loss: bool) -> str | None:
    """What the forward does with the result of ``self.head(...)`` that takes the logits themselves.

    None if it calls the head, may scale its result by a number, views it as rows of classes, passes it to
    transformers' loss function or to a cross-entropy, and returns it.

    Args:
        forward: a forward of the module's class.
        module: the module, whose attributes and configuration decide about branches.
        head: the name of the child that returns the logits.
        has_loss: whether the forward has to pass them to a loss.
    """
    function = inspect.unwrap(forward)
    if "__class__" in function.__code__.co_freevars:
        return "calls that of a base class"
    tree = _parsed(function)
    if tree is None:
        return "has no source to be read"
    if any(map(_asks_for_own_class, ast.walk(tree))):
        return "asks for its own class"
    reader = _Reader(module, head, function.__globals__)
    try:
        reader.read(tree.body)
    except _OtherUse as use:
        code = textwrap.shorten(ast.unparse(use.args[0]), 70, placeholder=" ...")
        return f"needs the logits for `{code}`"
    if not reader.calls_head:
        return f"does not call {head}"
    return "computes no cross-entropy of them" if has_loss and not reader.has_loss else None


def _asks_for_own_class(node: ast.AST) -> bool:
    """Such a call in a forward; it runs on a view of the module."""
    match node:
        case ast.Call(func=ast.Name(id="isinstance" | "issubclass" | "type"), args=[first, *_]):
            return ast.unparse(first) in ("self", "self.__class__")
    return False


def returns_that_of_its_base(forward: Callable) -> bool:
    """Whether all that the forward returns is ``super().forward(...)``."""
    tree = _parsed(inspect.unwrap(forward))
    returns = [node for node in ast.walk(tree) if isinstance(node, ast.Return)] if tree else []
    return bool(returns) and all(
        isinstance(r.value, ast.Call) and ast.unparse(r.value.func) == "super().forward" for r in returns
    )


def _parsed(function: Callable) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError, IndexError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


class _OtherUse(Exception):
    """Carries the expression or statement."""


class _Reader:
    """Follows the names that hold logits through the statements of a function."""

    def __init__(self, module: nn.Module, head: str, names: dict[str, Any]) -> None:
        self.module, self.head, self.globals = module, head, names
        self.held: set[str] = set()  # names that hold logits
        self.known: dict[str, Any] = {}  # names with their values, _CRITERION for a cross-entropy
        self.calls_head = self.has_loss = False

    def read(self, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            match statement:
                case ast.Assign(targets=targets, value=value):
                    for target in targets:
                        self.assign(target, value)
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    self.assign(target, value)
                case ast.Return(value=ast.expr() as value):
                    self.holds(value)
                case ast.If(test=test, body=body, orelse=orelse):
                    self.exclude(test)
                    known = self.constant(test)
                    branches = [body, orelse] if known is _UNKNOWN else [body if known else orelse]
                    held, shared, before = set(), None, (self.held, self.known)
                    for branch in branches:
                        self.held, self.known = set(before[0]), dict(before[1])
                        self.read(branch)
                        held |= self.held
                        shared = self.known if shared is None else _common(shared, self.known)
                    self.held, self.known = held, shared or {}
                case _:
                    for node in ast.walk(statement):
                        if isinstance(node, ast.expr) and self.holds(node):
                            raise _OtherUse(statement)
                        if isinstance(node, ast.Name):
                            self.known.pop(node.id, None)

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        held = self.holds(value)
        match target:
            case ast.Name(id=name):
                known = _CRITERION if _is_cross_entropy(value) else self.constant(value)
                self.held -= {name}
                self.known.pop(name, None)
                if held:
                    self.held.add(name)
                elif known is not _UNKNOWN:
                    self.known[name] = known
            case ast.Tuple(elts=elements) if all(isinstance(e, ast.Name) for e in elements):
                for element in elements:  # of which one may be the logits
                    self.assign(element, value)
            case _:
                for node in ast.walk(target):
                    if held or (isinstance(node, ast.Name) and node.id in self.held):
                        raise _OtherUse(target)

    def holds(self, node: ast.AST) -> bool:
        """Whether the value of the expression is logits, or a tuple or output with them."""
        match node:
            case ast.Name(id=name):
                return name in self.held
            case ast.Call():
                return self.call(node)
            case ast.NamedExpr(target=target, value=value):
                self.assign(target, value)
                return self.holds(value)
            case ast.Attribute(value=value, attr=attribute):
                if self.holds(value) and attribute not in _FACTS:
                    raise _OtherUse(node)
                return False
            case ast.Tuple(elts=elements):
                return self.one_holds(*elements)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                self.exclude(test)
                return self.one_holds(body, orelse)
            case ast.BinOp(left=ast.Tuple() as left, op=ast.Add(), right=right):
                return self.one_holds(left, right)
            case ast.BinOp(left=left, op=ast.Mult() | ast.Div(), right=right) if self.holds(left):
                self.exclude(right)
                if not isinstance(self.constant(right), int | float):
                    raise _OtherUse(node)
                return True
            case _:
                for child in ast.iter_child_nodes(node):
                    if self.holds(child):
                        raise _OtherUse(node)
                return False

    def one_holds(self, *nodes: ast.AST) -> bool:
        return True in [self.holds(node) for node in nodes]  # all of them are read

    def exclude(self, node: ast.expr) -> None:
        if self.holds(node):
            raise _OtherUse(node)

    def call(self, node: ast.Call) -> bool:
        given = self.one_holds(*node.args, *(keyword.value for keyword in node.keywords))
        match node.func:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                if name == self.head and not given:
                    self.calls_head = True
                    return True
                if given and (name == "loss_function" or _is_plain(getattr(self.module, name, None))):
                    self.has_loss = True
                    return False
            case ast.Attribute(value=value, attr=name) if self.holds(value):
                if given or name not in (*_SAME, *_FACTS):
                    raise _OtherUse(node)
                return name in _SAME
            case ast.Name(id=name) if given and self.known.get(name) is _CRITERION:
                self.has_loss = True
                return False
            case ast.Name(id=name) if given and _is_output(self.globals.get(name)):
                return True
        if given or self.holds(node.func):
            raise _OtherUse(node)
        return False

    def constant(self, node: ast.expr) -> Any:
        """The value of an expression of known names and attributes of self, if it is one."""
        if not all(isinstance(part, _READABLE) or _reads_config(part) for part in ast.walk(node)):
            return _UNKNOWN
        names = {"__builtins__": {}, "getattr": getattr, **self.known, "self": self.module}
        try:
            return eval(compile(ast.Expression(node), "<forward>", "eval"), names)
        except (AttributeError, NameError):
            return _UNKNOWN


def _common(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in first.items() if second.get(name, _UNKNOWN) is value}


def _reads_config(part: ast.AST) -> bool:
    """Whether it is the call of getattr or of a configuration's method."""
    return isinstance(part, ast.Call) and (
        ast.unparse(part.func) == "getattr"
        or (isinstance(part.func, ast.Attribute) and part.func.attr == "get_text_config" and not part.args)
    )


def _is_cross_entropy(value: ast.expr) -> bool:
    return (
        isinstance(value, ast.Call)
        and ast.unparse(value.func) in _CRITERIA
        and not value.args
        and {keyword.arg for keyword in value.keywords} <= _OPTIONS
    )


def _is_plain(criterion: Any) -> bool:
    return type(criterion) is nn.CrossEntropyLoss and criterion.weight is None


def _is_output(cls: Any) -> bool:
    """Whether it is a class of outputs, a dictionary."""
    return isinstance(cls, type) and issubclass(cls, dict)
