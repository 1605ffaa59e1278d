"""The OpenAPI document: it is what is served, no less and no more, and says whose token may do what."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
from jsonschema import Draft202012Validator

from tests.lanes import TOP
from warmcell.extension.keeper.api import PREFIX, KeeperApi
from warmcell.extension.keeper.gate import VERBS
from warmcell.extension.keeper.openapi import OPERATIONS, document
from warmcell.extension.server.handlers import routes

OWN = re.compile(r"/(status|doctor|templates|images|tokens|principals|kernels|remote|sandboxes/[^/]+/values)\b.*")
"""What is for processes and sandboxes of the user's own, on the keeper's sockets, and for nobody elsewhere."""

EXAMPLE = "x1"


def served() -> dict[str, set[str]]:
    """Paths of the keeper with an example for each variable, and their verbs."""
    api = KeeperApi(**{one.name: MagicMock() for one in dataclasses.fields(KeeperApi) if one.init})
    found: dict[str, set[str]] = {}
    for rule in api.application().wildcard_router.rules:
        matcher: Any = rule.matcher
        target: Any = rule.target
        kinds = [kind for kind in target.__mro__ if kind.__module__.startswith("warmcell")]
        verbs = {
            verb for verb in ("get", "post", "put", "patch", "delete") if any(verb in vars(kind) for kind in kinds)
        }
        for path in spelled(matcher.regex.pattern.removesuffix("$").removeprefix(PREFIX)):
            if not OWN.fullmatch(path):
                found.setdefault(path, set()).update(verbs)
    return found


def spelled(pattern: str) -> Iterator[str]:
    """Each path that a pattern of ours stands for."""
    parts = re.split(r"(\((?:[^()]|\([^()]*\))*\))", pattern.replace(r"\.", "."))
    choices = [
        part[1:-1].split("|") if re.fullmatch(r"\([a-z|]+\)", part) else [EXAMPLE if part.startswith("(") else part]
        for part in parts
    ]
    return ("".join(chosen) for chosen in itertools.product(*choices))


def documented() -> dict[str, set[str]]:
    """The document's paths in the same form."""
    return {re.sub(r"{\w+}", EXAMPLE, path): set(verbs) for path, verbs in OPERATIONS.items()}


def test_each_path_that_is_served_is_in_the_document_and_the_other_way_round() -> None:
    """With each verb of the document; where two paths share a handler, its other verbs are refused."""
    paths, written = served(), documented()
    del written["/principals/self"]  # Of a path that is otherwise for the user alone.
    assert set(paths) == set(written)
    assert {path: verbs - paths[path] for path, verbs in written.items() if verbs - paths[path]} == {}


def test_the_document_says_which_scope_a_token_needs() -> None:
    """As the gate holds it; what has none there is not for tokens, and each of its rules is for something."""
    used = set()
    for path, verbs in documented().items():
        for verb in verbs:
            rules = [rule for rule in VERBS if verb.upper() in rule[0].split("|") and re.fullmatch(rule[1], path)]
            template = next(one for one in OPERATIONS if re.sub(r"{\w+}", EXAMPLE, one) == path)
            assert OPERATIONS[template][verb].scope == (rules[0][2] if rules else None), (verb, path)
            used.update(rules[:1])
    assert used == set(VERBS)


def test_whoever_jupyter_knows_finds_all_of_it_at_a_server() -> None:
    """Each path of the document has a handler there; what a principal asks about itself apart."""
    patterns = [re.compile(pattern) for pattern, _ in routes()]
    for path in set(documented()) - {"/principals/self"}:
        assert any(pattern.fullmatch(PREFIX + path) for pattern in patterns), path


def test_the_committed_document_is_up_to_date() -> None:
    """docs/reference/openapi.json is what `scripts/openapi` prints now."""
    written = json.loads((TOP / "docs" / "reference" / "openapi.json").read_text())
    assert written == json.loads(json.dumps(document())), "run scripts/openapi > docs/reference/openapi.json"


def test_its_schemas_are_schemas_and_refer_to_what_is_there() -> None:
    """Every one, and every operation's name is its own."""
    whole = document()
    for schema in whole["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    names = {f"#/components/schemas/{name}" for name in whole["components"]["schemas"]}
    assert set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(whole))) == names
    ids = [verb["operationId"] for verbs in whole["paths"].values() for verb in verbs.values()]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(("pattern", "paths"), [("/a/([^/]+)/(b|c)", ["/a/x1/b", "/a/x1/c"]), (r"/d\.e", ["/d.e"])])
def test_patterns_are_spelled_out(pattern: str, paths: list[str]) -> None:
    """On which the comparison rests."""
    assert list(spelled(pattern)) == paths
