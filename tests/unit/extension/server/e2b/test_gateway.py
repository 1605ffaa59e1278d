"""How E2B's clients start the MCP gateway, and what of a request reaches it."""

import pytest

from warmcell.extension.server.e2b.gateway import PROGRAM, started_by, token_at
from warmcell.extension.server.ports.headers import Place, to_port


def test_what_clients_start_it_with_is_known() -> None:
    """As the package writes it, whatever is in the configuration."""
    config = '{"a": {"runCmd": "it\'s $(x)"}}'
    command = 'mcp-gateway --config \'{"a": {"runCmd": "it\'"\'"\'s $(x)"}}\''
    assert started_by(["/bin/bash", "-l", "-c", command]) == [*PROGRAM, "--config", config]


@pytest.mark.parametrize(
    "argv",
    [
        ["/bin/bash", "-l", "-c", "echo mcp-gateway --config {}"],
        ["/bin/bash", "-l", "-c", "mcp-gateway-other --config {}"],
        ["/bin/bash", "-l", "-c", "mcp-gateway --config '{"],
        ["/bin/bash", "-c", "mcp-gateway --config {}"],
        ["mcp-gateway", "--config", "{}"],
        [""],
    ],
)
def test_other_commands_are_others(argv: list[str]) -> None:
    """So that nobody is root by the way."""
    assert started_by(argv) is None


def test_only_its_token_is_where_roots_is() -> None:
    """No other file of root's is."""
    assert token_at("/etc/mcp-gateway/.token") == ".mcp-gateway/token"
    assert token_at("/etc/mcp-gateway/../shadow") is None


@pytest.mark.parametrize("shown", ["Basic YTpi", "token abc", "Bearer hub", "Basic eDp3Y3RfeA=="])
def test_an_authorization_goes_to_a_gateway_alone(shown: str) -> None:
    """What opens something of the server's, or of a proxy's before it, is told to no port."""
    place = Place(port=50005, scheme="http", host="h")
    assert b"Authorization" not in dict(to_port([("Authorization", shown)], place))
    known = Place(port=50005, scheme="http", host="h", authorized=True)
    assert dict(to_port([("Authorization", shown)], known))[b"Authorization"] == shown.encode()
