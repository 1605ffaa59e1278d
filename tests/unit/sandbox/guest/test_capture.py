"""Which variables a remote cell is sent: those that it may read before it assigns them."""

import builtins
import sys

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from warmcell.sandbox.guest.magics.capture import captured, reads

TRANSFORM = TransformerManager().transform_cell


def needed(cell: str) -> set[str]:
    return {name for name in reads(cell, TRANSFORM).needed if not hasattr(builtins, name)}


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("print(a)", {"a"}),
        ("a = 1\nprint(a)", set()),
        ("a = a + 1", {"a"}),
        ("a += 1", {"a"}),
        ("a: int = b", {"b"}),
        ("a: int\na", {"a"}),
        ("x.y = z", {"x", "z"}),
        ("x[i] = 1", {"x", "i"}),
        ("x[i] += 1", {"x", "i"}),
        ("del a", {"a"}),
        ("f'{a} {b!r:>{c}}'", {"a", "b", "c"}),
        ("[x * k for x in xs if x > t]", {"k", "xs", "t"}),
        ("{k: v for k, v in d.items()}", {"d"}),
        ("[[y for y in x] for x in xs]", {"xs"}),
        ("any(x in s for x in xs)", {"s", "xs"}),
        ("[last := x for x in xs]\nlast", {"xs"}),
        ("[[last := y for y in x] for x in xs]\nlast", {"xs"}),
        ("[total := total + x for x in xs]", {"total", "xs"}),
        ("[x for x in xs]\nx", {"xs", "x"}),
        ("[lambda: (x, k) for x in xs]", {"xs", "k"}),
        ("def f(a=[x for x in xs], b: {x for x in ys} = None): pass", {"xs", "ys"}),
        ("class A(base(x for x in xs)): ys = [y * k for y in zs]", {"base", "xs", "k", "zs"}),
        ("class A(A): pass", {"A"}),
        ("[await f(x) async for x in xs]", {"f", "xs"}),
        ("(n := len(a)) + n", {"a"}),
        ("lambda x, y=d: x + y + z", {"d", "z"}),
        ("def f(x, y=d):\n    return x + y + z", {"d", "z"}),
        ("def f(n):\n    return f(n - 1)", set()),
        ("def f():\n    def g():\n        return deep\n    return g", {"deep"}),
        ("def f():\n    global counter\n    counter += 1", {"counter"}),
        ("def f():\n    local = 1\n    return local", set()),
        ("@decorate\ndef f(): pass", {"decorate"}),
        ("def f(x: Kind) -> Other: pass", {"Kind", "Other"}),
        ("class A(Base, metaclass=M):\n    size = n\n    def m(self): return A, help_", {"Base", "M", "n", "help_"}),
        ("class A:\n    size = size\n    twice = 2 * size", {"size"}),
        ("class A:\n    n += 1", {"n"}),
        ("class A:\n    size = 1\n    twice = 2 * size", set()),
        ("class A:\n    size = 1\n    def m(self): return size", {"size"}),
        ("class A:\n    size = 1\n    class B:\n        of = size", {"size"}),
        ("class A:\n    kind = 1\n    @tag(kind)\n    def m(self, x=kind): return A", {"tag"}),
        ("def f():\n    class A:\n        size = size\n    return A", {"size"}),
        ("df.query('v > @limit and w < @other.x')", {"df", "limit", "other"}),
        ("[df.query(f'{column} > @limit') for column in columns]", {"df", "columns", "limit"}),
        ("mail('me@home')", {"mail"}),
        ("eval('a + 1')", {"a"}),
        ("def f(x):\n    y = 1\n    !echo {x} $y {z}", {"z"}),
        ("def f():\n    %timeit -n 1 g(k)", {"g", "k"}),
        ("async def f():\n    await g()\nawait f()", {"g"}),
        ("await task", {"task"}),
        ("async for x in xs:\n    use(x)", {"xs", "use"}),
        ("for x in xs:\n    y = x\nprint(x, y)", {"xs", "x", "y"}),
        ("if c:\n    a = 1\nprint(a)", {"c", "a"}),
        ("if c:\n    a = 1\nelse:\n    a = 2\nprint(a)", {"c"}),
        ("while go:\n    a = 1\na", {"go", "a"}),
        ("try:\n    a = f()\nexcept E as e:\n    a = e\na", {"f", "E"}),
        ("try:\n    a = f()\nexcept E:\n    raise\na", {"f", "E"}),
        ("with open(p) as file, lock:\n    data = file.read()\ndata", {"p", "lock"}),
        ("import numpy as np\nnp.zeros(n)", {"n"}),
        ("from os import path\npath.join(a)", {"a"}),
        ("a, *b = c\na, b", {"c"}),
        ("x = a if c else b", {"a", "b", "c"}),
        ("print(len(range(3)))", set()),
        ("%timeit f(x)", {"f", "x"}),
        ("%timeit -n 10 -r 3 f(x)", {"f", "x"}),
        ("%timeit -n10 -o f(x)", {"f", "x"}),
        ("%prun -s cumulative -l 10 -q f(x)", {"f", "x"}),
        ("%prun -T 'my file.txt' f(x)", {"f", "x"}),
        ("%lprun -f g -f h.inner f(x)", {"f", "x", "g", "h"}),
        ("%%remote gpu=any send=a,b each=items get=c as=d\nx = y + item", {"y", "a", "b", "items", "item"}),
        ("%%time\nget_ipython().run_cell_magic('remote', 'get=z', 'z = x + 1')\nz", {"x"}),
        ("%%time\ny = g(x)", {"g", "x"}),
        ("%%capture out\nprint(x)", {"x"}),
        ("!ls $folder {name.upper()}", {"folder", "name"}),
        ("files = !ls {folder}", {"folder"}),
        ("%cd $folder", {"folder"}),
        ("x = 1\n%timeit f(x)", {"f"}),
        ("this is no python", set()),
        ("", set()),
    ],
)  # fmt: skip
def test_names_are_found(cell: str, expected: set[str]) -> None:
    """Through scopes, ways that part, f-strings and magics; what is surely assigned before is not needed."""
    assert needed(cell) - {"get_ipython"} == expected


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12 brought the syntax")
@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("def f[T](x: T, y: Kind = d) -> list[T]: return g(x)", {"Kind", "d", "g"}),
        ("def f[T: (Kind, Other)](x: T): return T", {"Kind", "Other"}),
        ("def f[T](x: T): return T\nT", {"T"}),
        ("class A[T](Base[T], key=v):\n    x: T\n    def m[U](self, x: U) -> T: return k", {"Base", "v", "k"}),
        ("type X = list[Kind | X]\nX", {"Kind"}),
        ("type X[T: Bound] = dict[T, Kind]", {"Bound", "Kind"}),
        ('f"{f"{deep}"}"', {"deep"}),
    ],
)
def test_type_parameters_are_not_the_notebooks(cell: str, expected: set[str]) -> None:
    """They belong to what has them; their bounds are read, and so is what a type's alias stands for."""
    assert needed(cell) == expected


@pytest.mark.skipif(sys.version_info < (3, 14), reason="Python 3.14 brought the syntax")
@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("t'{a!r:{w}}'", {"a", "w"}),
        ("def f(): return t'{a + b}'", {"a", "b"}),
        ("def f(x: Later) -> Kind: pass", {"Later", "Kind"}),
        ("try:\n    pass\nexcept A, B:\n    pass", {"A", "B"}),
    ],
)
def test_templates_and_late_annotations_are_read(cell: str, expected: set[str]) -> None:
    """Names in a template string are values at once, those of an annotation when somebody asks for it."""
    assert needed(cell) == expected


def test_names_of_a_comprehension_are_not_assigned() -> None:
    """Python 3.12 and later count them among the names of the scope around; they are gone afterwards all the same."""
    assert reads("[x for x in xs]\n{k: v for k, v in d}", TRANSFORM).assigned == set()
    assert reads("[last := x for x in xs]", TRANSFORM).assigned == {"last"}


def test_match_statements_bind_their_names() -> None:
    """Captures of a pattern are its own, values and classes that it names are not."""
    cell = "match command:\n    case Point(x=0, y=y): print(y)\n    case [first, *rest]: print(first, rest, k)"
    assert needed(cell) == {"command", "Point", "k"}


def test_only_variables_of_the_notebook_are_captured() -> None:
    """A name that the notebook does not have is the remote cell's own matter; hidden ones never go."""
    found = reads("print(a, b, get_ipython)", TRANSFORM)
    assert captured(found, {"a": 1, "get_ipython": 2, "c": 3}, hidden={"get_ipython"}) == {"a": 1}


def test_what_may_be_a_module_is_known() -> None:
    """With the names that are taken from it, also within magics."""
    found = reads("import a.b as c\nfrom d.e import f\n%time import g\n", TransformerManager().transform_cell)
    assert found.imported == {"a.b", "d.e", "d.e.f", "g"}


def test_what_is_assigned_is_known() -> None:
    """By any statement, on any way, also where it is in a function's global."""
    cell = "a = 1\nfor b in c: d = 2\ndef e():\n    global f\n    f = 1\nimport g.h\n%time i = 3"
    assert reads(cell, TRANSFORM).assigned >= {"a", "b", "d", "e", "f", "g", "i"}
