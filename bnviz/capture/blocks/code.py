"""How a module's code uses a list of modules: one after the other, or side by side; read from its source, without running it."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_SIMPLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr)
_LOOKS = {"len", "enumerate", "zip", "range", "reversed", "isinstance", "getattr", "hasattr", "id", "print", "slice"}


def in_a_row(owner: nn.Module, name: str) -> bool | None:
    """True: each member of `owner.name` is given what the one before gave. False: they are used side by side (experts, heads,
    branches). None: the source does not say.
    """
    kind: Any = type(owner)
    return _answer(kind, name)


@functools.lru_cache(maxsize=1024)
def _answer(owner: Any, name: str) -> bool | None:
    """`in_a_row` of a class."""
    mentioned = (f for f in _methods(owner) if name in _names_in(f.__code__))  # few are parsed
    trees = (tree for tree in map(_tree, mentioned) if tree is not None)
    found = {answer for tree in trees for answer in _uses(tree, name)}
    return True if True in found else False if found else None


def _methods(owner: type) -> Iterator[FunctionType]:
    """The methods of a class and of those it inherits from, short of PyTorch's own base."""
    for cls in owner.__mro__:
        if cls in (nn.Module, object) or cls.__module__.startswith("torch.nn.modules.container"):
            continue
        for name, member in vars(cls).items():
            function = inspect.unwrap(member) if callable(member) else None
            if isinstance(function, FunctionType) and name != "__init__":
                yield function


@functools.lru_cache(maxsize=4096)
def _names_in(code: CodeType) -> frozenset[str]:
    inner = (_names_in(c) for c in code.co_consts if isinstance(c, CodeType))
    return frozenset(code.co_names).union(*inner)


@functools.lru_cache(maxsize=1024)
def _tree(function: FunctionType) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    return next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None)


def _uses(function: ast.FunctionDef, name: str) -> Iterator[bool]:
    """For each call of a member of `self.name`: whether something it is given comes from what it gave before."""
    members = _members(function, name)
    for scope in _scopes(function):
        feeds = [(_targets(s), _names(s.value)) for s in scope if isinstance(getattr(s, "value", None), ast.AST)]
        for statement in scope:
            for call in _calls(statement, members, name):
                given = {n for a in [*call.args, *(k.value for k in call.keywords)] for n in _names(a)} - members
                yield bool(given & _reach(_targets(statement), feeds))


def _scopes(node: ast.AST) -> Iterator[list[Any]]:
    """Statements that run together: those of each loop, without the loops inside it, and those outside every loop."""
    own: list[ast.AST] = []
    open_ = list(ast.iter_child_nodes(node))
    while open_:
        inner = open_.pop()
        if isinstance(inner, ast.For | ast.While):
            yield from _scopes(inner)
        elif isinstance(inner, _SIMPLE):
            own.append(inner)
        else:
            open_ += ast.iter_child_nodes(inner)
    yield own


def _members(function: ast.FunctionDef, name: str) -> set[str]:
    """Local names that stand for a member of the list: loop variables over it, and what is assigned from it by index."""
    found: set[str] = set()
    for _ in range(2):  # for group in self.groups: for layer in group: ...
        for node in ast.walk(function):
            if isinstance(node, ast.For | ast.comprehension) and _mentions(node.iter, found, name):
                found |= _names(node.target)
            elif isinstance(node, ast.Assign) and _picks(node.value, name):
                found |= {n for target in node.targets for n in _names(target)}
    return found


def _picks(value: ast.AST, name: str) -> bool:
    return isinstance(value, ast.Subscript) and _is_list(value.value, name)


def _mentions(node: ast.AST, members: set[str], name: str) -> bool:
    return any(
        _is_list(inner, name) or (isinstance(inner, ast.Name) and inner.id in members) for inner in ast.walk(node)
    )


def _is_list(node: ast.AST, name: str) -> bool:
    """`self.name`, or the same through something else: `self.encoder.name`."""
    return isinstance(node, ast.Attribute) and node.attr == name


def _targets(statement: ast.AST) -> set[str]:
    """Names that a statement writes to; of `x[i] = ...`, x."""
    if isinstance(statement, ast.Assign):
        return {n for target in statement.targets for n in _written(target)}
    return _written(statement.target) if isinstance(statement, ast.AugAssign | ast.AnnAssign) else set()


def _written(target: ast.AST) -> set[str]:
    """Names an assignment to `target` changes: of `x[i]` and `x.y`, x."""
    if isinstance(target, ast.Tuple | ast.List):
        return {name for element in target.elts for name in _written(element)}
    while isinstance(target, ast.Subscript | ast.Attribute | ast.Starred):
        target = target.value
    return _names(target)


def _calls(statement: ast.AST, members: set[str], name: str) -> Iterator[ast.Call]:
    """Calls of a member, or of something that is given a member (a checkpoint); in a comprehension as if given nothing."""
    side = {
        id(inner)
        for node in ast.walk(statement)
        if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.DictComp | ast.SetComp)
        for inner in ast.walk(node)
    }
    for node in ast.walk(statement):
        if not isinstance(node, ast.Call) or (isinstance(node.func, ast.Name) and node.func.id in _LOOKS):
            continue
        member = any(_is_member(part, members, name) for part in [node.func, *node.args])
        if member:
            yield ast.Call(node.func, [] if id(node) in side else node.args, [] if id(node) in side else node.keywords)


def _is_member(node: ast.AST, members: set[str], name: str) -> bool:
    if isinstance(node, ast.Attribute) and node.attr in ("__call__", "forward"):
        node = node.value
    return (isinstance(node, ast.Name) and node.id in members) or _picks(node, name) or _is_list(node, name)


def _reach(start: set[str], feeds: list[tuple[set[str], set[str]]]) -> set[str]:
    """Names that something in `start` flows into."""
    reached, grew = set(start), True
    while grew:
        grew = False
        for targets, used in feeds:
            if used & reached and not targets <= reached:
                reached, grew = reached | targets, True
    return reached


def _names(node: ast.AST) -> set[str]:
    """Local names in an expression."""
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and inner.id != "self"}
