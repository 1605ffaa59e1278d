"""Which variables a cell needs: those that it may read before it has assigned them."""

from __future__ import annotations

import ast
import contextlib
import re
import symtable
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

PYTHON_MAGICS = frozenset(
    {"time", "timeit", "prun", "capture", "mprun", "memit", "lprun", "debug", "pinfo", "pdef", "remote"}
)
"""Magics whose line or cell is Python."""

_VALUED = {"prun": "lsTD", "timeit": "nrp", "lprun": "mDTsru", "mprun": "mT", "memit": "rtI", "debug": "b"}
"""Letters of options, by magic, that have a value; it is no Python."""

_EVALUATED = {"lprun": "f", "mprun": "f"}
"""Those whose value is Python: what is to be looked at."""

_OPTION = re.compile(r"\s*-(?P<letter>[a-zA-Z])(?P<rest>\S*)(?:\s+|$)")
_WORD = re.compile(r"\s*(?P<word>\"[^\"]*\"|'[^']*'|\S+)(?:\s+|$)")
_INSERTED = re.compile(r"(?<!\$)\$(?P<plain>[A-Za-z_]\w*)|\{(?P<braces>[^{}]+)\}")
_COMPREHENSIONS = ("listcomp", "setcomp", "dictcomp", "genexpr")
_SHELL_CALLS = ("system", "getoutput", "run_line_magic", "run_cell_magic")


class Reads(NamedTuple):
    """The names of a cell."""

    needed: frozenset[str]
    """Read before they are assigned, as far as can be known: on some way through the cell."""
    assigned: frozenset[str]
    """Assigned, on some way through it."""
    imported: frozenset[str] = frozenset()
    """Dotted names of what may be modules among what it imports."""


def reads(cell: str, transform: Callable[[str], str]) -> Reads:
    """The names that `cell` reads and assigns; none where it is not Python, which it will say itself.

    Args:
        cell: As its user wrote it.
        transform: Makes Python of a cell with magics, as IPython's `transform_cell`.
    """
    try:
        tree = ast.parse(transform(cell))
    except (SyntaxError, ValueError, RecursionError):
        return Reads(frozenset(), frozenset())
    walker = _Walker(transform)
    walker.block(tree.body)
    return Reads(frozenset(walker.needed), frozenset(walker.assigned), frozenset(walker.imported))


def captured(
    found: Reads, namespace: Mapping[str, Any], *, hidden: Mapping[str, Any] | Iterable[str] = ()
) -> dict[str, Any]:
    """Those of the names that are variables of the notebook, with their values."""
    return {name: namespace[name] for name in sorted(found.needed) if name in namespace and name not in hidden}


class _Walker(ast.NodeVisitor):
    """Goes through statements in the order in which they run, and knows what is surely assigned by then."""

    def __init__(self, transform: Callable[[str], str]) -> None:
        self._transform = transform
        self.sure: set[str] = set()
        self.needed: set[str] = set()
        self.assigned: set[str] = set()
        self.imported: set[str] = set()

    def block(self, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            self.visit(statement)

    # Names

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._read(node.id)
        elif isinstance(node.ctx, ast.Store):
            self._assign(node.id)
        else:
            self._read(node.id)
            self.sure.discard(node.id)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self._read(node.target.id)
        self.visit(node.value)
        self.visit(node.target)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.visit(target)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit(node.annotation)
        if node.value is not None:
            self.visit(node.value)
            self.visit(node.target)
        elif not isinstance(node.target, ast.Name):
            self.visit(node.target)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self.visit(node.target)

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            self.imported.add(name.name)
            self._assign(name.asname or name.name.partition(".")[0])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and not node.level:
            self.imported.update((node.module, *(f"{node.module}.{name.name}" for name in node.names)))
        for name in node.names:
            self._assign(name.asname or name.name)

    # Scopes of their own

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for decorator in node.decorator_list:
            self.visit(decorator)
        with self._parameters(node):
            self._signature(node.args)
            if node.returns is not None:
                self.visit(node.returns)
        self._assign(node.name)  # It may call itself.
        self._scope(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._signature(node.args)
        self._scope(ast.Expr(node))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for decorator in node.decorator_list:
            self.visit(decorator)
        with self._parameters(node):
            for part in (*node.bases, *(keyword.value for keyword in node.keywords)):
                self.visit(part)
        self._assign(node.name)  # Its methods may name it.
        self._scope(node)

    def visit_TypeAlias(self, node: Any) -> None:
        """Since Python 3.12; its value is looked at when it is asked for, and may name itself."""
        self._assign(node.name.id)
        self._scope(node)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        first, *others = node.generators
        self.visit(first.iter)  # In the scope around it.
        element = ast.Tuple([node.key, node.value], ast.Load()) if isinstance(node, ast.DictComp) else node.elt
        inner = ast.comprehension(first.target, ast.Tuple([], ast.Load()), first.ifs, first.is_async)
        # Since Python 3.12 the names of all kinds but generators are those of the scope around them.
        given = self._scope(ast.Expr(ast.GeneratorExp(element, [inner, *others])), inside=False)
        self.sure |= given  # By a walrus.

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    @contextlib.contextmanager
    def _parameters(self, node: ast.AST) -> Iterator[None]:
        """Within this, the names of its type parameters (Python 3.12) are known."""
        names = {one.name for one in getattr(node, "type_params", ())} - self.sure
        self.sure |= names
        try:
            yield
        finally:
            self.sure -= names

    def _signature(self, arguments: ast.arguments) -> None:
        for default in (*arguments.defaults, *(one for one in arguments.kw_defaults if one is not None)):
            self.visit(default)
        every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
        for argument in every:
            if argument is not None and argument.annotation is not None:
                self.visit(argument.annotation)

    def _scope(self, statement: ast.stmt, *, inside: bool = True) -> set[str]:
        """What a scope within takes from the notebook, and what it gives it, which is told; Python's compiler knows.

        Args:
            statement: What has it.
            inside: Ask as of a statement in a function, so that names of comprehensions in its defaults and bases are
                the function's.
        """
        around = ast.parse("async def _(): pass" if inside else "")
        (around.body[0].body if inside else around.body)[:] = [statement]  # type: ignore[attr-defined]
        source = ast.unparse(ast.fix_missing_locations(around))
        try:
            table = symtable.symtable(source, "<cell>", "exec")
        except SyntaxError:  # It will say so itself.
            return set()
        taken, given = _globals_of(table)
        for name in taken:
            self._read(name)
        self.assigned |= given
        return given

    # Ways that part

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self._ways(node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        self._ways([node.body], [node.orelse])

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.visit(node.values[0])
        self._ways(node.values[1:], [])

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self.visit(node.iter)
        before = set(self.sure)
        self.visit(node.target)
        self.block(node.body)
        self.sure = before
        self._ways(node.orelse, [])

    visit_AsyncFor = visit_For

    def visit_While(self, node: ast.While) -> None:
        self.visit(node.test)
        self._ways(node.body, [])
        self._ways(node.orelse, [])

    def visit_Try(self, node: ast.Try) -> None:
        before = set(self.sure)
        self.block(node.body)
        self.block(node.orelse)
        after = self.sure
        for handler in node.handlers:
            self.sure = set(before)
            if handler.type is not None:
                self.visit(handler.type)
            if handler.name:
                self._assign(handler.name)
            self.block(handler.body)
            after = after & self.sure if not _leaves(handler.body) else after
        self.sure = after
        self.block(node.finalbody)

    def visit_TryStar(self, node: Any) -> None:
        """As `try`."""
        self.visit_Try(node)

    def visit_Match(self, node: Any) -> None:
        self.visit(node.subject)
        before = set(self.sure)
        for case in node.cases:
            self.sure = set(before)
            for part in ast.walk(case.pattern):
                for field in ("name", "rest"):
                    name = getattr(part, field, None)
                    if isinstance(name, str):
                        self._assign(name)
                if isinstance(part, (ast.Attribute, ast.Name)):
                    self.visit(part)
            if case.guard is not None:
                self.visit(case.guard)
            self.block(case.body)
        self.sure = before

    def _ways(self, one: Iterable[ast.AST], other: Iterable[ast.AST]) -> None:
        before = set(self.sure)
        for node in one:
            self.visit(node)
        first, self.sure = self.sure, before
        for node in other:
            self.visit(node)
        self.sure = self.sure & first

    # Magics

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        called = node.func
        if not (
            isinstance(called, ast.Attribute)
            and called.attr in _SHELL_CALLS
            and isinstance(called.value, ast.Call)
            and isinstance(called.value.func, ast.Name)
            and called.value.func.id == "get_ipython"
        ):
            return
        texts = [part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        if called.attr in ("run_line_magic", "run_cell_magic") and texts and texts[0] in PYTHON_MAGICS:
            self._magic(*texts[:3])
            return
        for text in texts:
            self._inserted(text)

    def _magic(self, name: str, line: str = "", cell: str = "") -> None:
        code, evaluated = ("", "") if name in ("capture", "remote") else _statement(name, line)
        inside = reads("\n".join((code, cell)), self._transform)
        if not inside.needed and not inside.assigned and code:
            inside = reads(cell or code.strip().rstrip("?"), self._transform)
        needed = inside.needed | (reads(evaluated, self._transform).needed if evaluated else frozenset())
        if name == "remote":
            needed |= _named(line, "send", "each")
        for one in needed:
            self._read(one)
        self.imported |= inside.imported
        # What a remote cell assigns, it assigns in yet another kernel.
        for assigned in _named(line, "get", "as") if name == "remote" else inside.assigned:
            self._assign(assigned)

    def _inserted(self, text: str) -> None:
        """IPython puts values into the lines of magics and commands: $name and {expression}."""
        for found in _INSERTED.finditer(text):
            code = found["plain"] or found["braces"]
            try:
                self.visit(ast.parse(code.strip(), mode="eval").body)
            except (SyntaxError, ValueError):
                continue

    def _read(self, name: str) -> None:
        if name not in self.sure:
            self.needed.add(name)

    def _assign(self, name: str) -> None:
        self.sure.add(name)
        self.assigned.add(name)


def _globals_of(table: symtable.SymbolTable) -> tuple[set[str], set[str]]:
    """Names that the scopes within take from the module, and those that they give it."""
    taken: set[str] = set()
    given: set[str] = set()
    for child in table.get_children():
        for symbol in child.get_symbols():
            if symbol.is_global() or (child.get_type() == "class" and not symbol.is_local() and not symbol.is_free()):
                if symbol.is_referenced():
                    taken.add(symbol.get_name())
                if symbol.is_assigned() and child.get_name().strip("<>") not in _COMPREHENSIONS:
                    taken.add(symbol.get_name())  # `x += 1` reads it, and the compiler does not say so.
                if symbol.is_assigned():
                    given.add(symbol.get_name())
        inner = _globals_of(child)
        taken |= inner[0]
        given |= inner[1]
    return taken, given


def _statement(magic: str, line: str) -> tuple[str, str]:
    """What is left of a magic's line behind its options, and what of these is Python."""
    evaluated: list[str] = []
    while (found := _OPTION.match(line)) is not None:
        line, letter, value = line[found.end() :], found["letter"], found["rest"]
        is_python = letter in _EVALUATED.get(magic, "")
        if not value and (is_python or letter in _VALUED.get(magic, "")):
            word = _WORD.match(line)
            if word is not None:
                line, value = line[word.end() :], word["word"]
        if is_python:
            evaluated.append(value)
    return line, "\n".join(evaluated)


def _named(line: str, *keys: str) -> frozenset[str]:
    """Variables that a line of `%%remote` names with these keys."""
    found = re.findall(rf"(?<!\S)(?:{'|'.join(keys)})=(\S+)", line)
    return frozenset(name for names in found for name in names.split(",") if name.isidentifier())


def _leaves(body: list[ast.stmt]) -> bool:
    """Whether nothing after this block is reached from it."""
    return bool(body) and isinstance(body[-1], (ast.Raise, ast.Return, ast.Continue, ast.Break))
