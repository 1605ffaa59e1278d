"""What scopes within a cell take from it, as Python's own compiler knows."""

from __future__ import annotations

import ast
import copy
import symtable

_COMPREHENSIONS = ("listcomp", "setcomp", "dictcomp", "genexpr")


def globals_of(table: symtable.SymbolTable) -> tuple[set[str], set[str]]:
    """Names that the scopes within take from the module, and those that they give it."""
    taken: set[str] = set()
    given: set[str] = set()
    for child in table.get_children():
        for symbol in child.get_symbols():
            # A class's body may read a name that it assigns too, as in `size = size`.
            is_read = symbol.is_referenced() and child.get_type() == "class" and not symbol.is_free()
            if is_read or (symbol.is_global() and symbol.is_referenced()):
                taken.add(symbol.get_name())
            if symbol.is_global() and symbol.is_assigned():
                if child.get_name().strip("<>") not in _COMPREHENSIONS:
                    taken.add(symbol.get_name())  # `x += 1` reads it, and the compiler does not say so.
                given.add(symbol.get_name())
        inner = globals_of(child)
        taken |= inner[0]
        given |= inner[1]
    return taken, given


def locals_of(table: symtable.SymbolTable) -> set[str]:
    """Names that are variables of the scopes within."""
    return {
        name
        for child in table.get_children()
        for name in (*(symbol.get_name() for symbol in child.get_symbols() if symbol.is_local()), *locals_of(child))
    }


def bare(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> ast.AST:
    """A function without what is evaluated outside of it."""
    bare, args = copy.copy(function), function.args
    bare.args = ast.arguments(
        **{kind: [ast.arg(one.arg) for one in getattr(args, kind)] for kind in ("posonlyargs", "args", "kwonlyargs")},
        vararg=args.vararg and ast.arg(args.vararg.arg),
        kwarg=args.kwarg and ast.arg(args.kwarg.arg),
        kw_defaults=[None] * len(args.kwonlyargs),
        defaults=[],
    )
    if not isinstance(bare, ast.Lambda):
        bare.decorator_list, bare.returns = [], None
    return bare


def dotted_of(tree: ast.AST) -> frozenset[str]:
    """All dotted names in it."""
    found = set()
    for node in ast.walk(tree):
        names: list[str] = []
        part: ast.AST = node
        while isinstance(part, ast.Attribute):
            names.append(part.attr)
            part = part.value
        if names and isinstance(part, ast.Name):
            found.add(".".join([part.id, *reversed(names)]))
    return frozenset(found)
