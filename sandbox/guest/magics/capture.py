"""Which variables a cell needs: those that it may read before it has assigned them."""

from __future__ import annotations

import ast
import contextlib
import re
import symtable
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from .scopes import bare, dotted_of, globals_of, locals_of

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
_IN_QUERY = re.compile(r"@([A-Za-z_]\w*)")
_SHELL_CALLS = ("system", "getoutput", "run_line_magic", "run_cell_magic")


class Reads(NamedTuple):
    """The names of a cell."""

    needed: frozenset[str]
    """Read before they are assigned, as far as can be known: on some way through the cell."""
    assigned: frozenset[str]
    """Assigned, on some way through it."""
    imported: frozenset[str] = frozenset()
    """Dotted names of what may be modules among what it imports."""
    dotted: frozenset[str] = frozenset()
    """Dotted names that it reads, as `os.path.join`, and what they begin with."""


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
    return Reads(frozenset(walker.needed), frozenset(walker.assigned), frozenset(walker.imported), dotted_of(tree))


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
        self._module: _Walker = self
        """Of the cell itself, whose names scopes within take."""

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
        self._scope(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for decorator in node.decorator_list:
            self.visit(decorator)
        with self._parameters(node):
            for part in (*node.bases, *(keyword.value for keyword in node.keywords)):
                self.visit(part)
            self._assign(node.name)  # Its methods may name it.
            _ClassBody(self._module).block(node.body)

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
        self.sure |= self._scope(ast.GeneratorExp(element, [inner, *others]))  # By a walrus.

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    @contextlib.contextmanager
    def _parameters(self, node: ast.AST) -> Iterator[None]:
        """Within this, the names of its type parameters (Python 3.12) are known."""
        known = self._module.sure
        names = {one.name for one in getattr(node, "type_params", ())} - known
        known |= names
        try:
            yield
        finally:
            self._module.sure -= names

    def _signature(self, arguments: ast.arguments) -> None:
        for default in (*arguments.defaults, *(one for one in arguments.kw_defaults if one is not None)):
            self.visit(default)
        every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
        for argument in every:
            if argument is not None and argument.annotation is not None:
                self.visit(argument.annotation)

    def _scope(self, node: ast.AST) -> set[str]:
        """What a scope within takes from the notebook, and what it gives it, which is told; Python's compiler knows."""
        alone = bare(node) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) else node
        source = ast.unparse(ast.fix_missing_locations(alone))
        try:
            table = symtable.symtable(source, "<cell>", "exec")
        except SyntaxError:  # It will say so itself.
            return set()
        taken, given = globals_of(table)
        said = _Walker(self._transform)
        for part in ast.walk(node):
            if isinstance(part, ast.Call):
                said._texts(part)
        self.imported |= said.imported
        self._read_all(taken | (said.needed - locals_of(table)))
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
        self._texts(node)

    def _texts(self, call: ast.Call) -> None:
        """What a call reads by what its texts say: magics, commands, `eval("x + 1")`, `df.query("v > @limit")`."""
        called = call.func
        texts = [part.value for part in call.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        if isinstance(called, ast.Name) and called.id in ("eval", "exec"):
            self._read_all(reads("\n".join(texts[:1]), self._transform).needed)
        elif not isinstance(called, ast.Attribute):
            return
        elif called.attr in ("eval", "query"):
            said = [part.value for one in call.args for part in ast.walk(one) if isinstance(part, ast.Constant)]
            self._read_all(name for text in said if isinstance(text, str) for name in _IN_QUERY.findall(text))
        elif called.attr in _SHELL_CALLS and _is_shell(called.value):
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
        self._read_all(needed)
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

    def _read_all(self, names: Iterable[str]) -> None:
        for name in names:
            self._read(name)

    def _read(self, name: str) -> None:
        if name not in self.sure:
            self.needed.add(name)

    def _assign(self, name: str) -> None:
        self.sure.add(name)
        self.assigned.add(name)


class _ClassBody(_Walker):
    """Goes through the statements of a class: what they assign is the class's, and no function within sees it."""

    def __init__(self, module: _Walker) -> None:
        super().__init__(module._transform)
        self._module, self.imported = module, module.imported

    def _scope(self, node: ast.AST) -> set[str]:
        return self._module._scope(node)

    def _read(self, name: str) -> None:
        if name not in self.sure:
            self._module._read(name)

    def _assign(self, name: str) -> None:
        self.sure.add(name)


def _is_shell(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "get_ipython"


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
