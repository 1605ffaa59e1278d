"""What a policy says to hosts, ports and addresses."""

import ipaddress
import json

import pytest

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.models import NetworkPolicy, SandboxSpec
from warmcell.sandbox.network import addresses, rules
from warmcell.sandbox.network.egress import Egress, EgressBounds
from warmcell.sandbox.network.index import Index
from warmcell.sandbox.network.rules import Pattern, Rules, read_host
from warmcell.sandbox.wire import Secret

CLOSED = [
    *("0.0.0.0", "0.1.2.3", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.0.1"),
    *("168.63.129.16", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.2.1", "192.168.1.1"),
    *("198.18.0.1", "203.0.113.9", "224.0.0.1", "239.1.1.1", "255.255.255.255", "::", "::1", "::ffff:127.0.0.1"),
    *("::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2001::1"),
    *("2001:db8::1", "2002:7f00:1::", "fc00::1", "fd00:ec2::254", "fe80::1", "ff02::1", "::ffff:0:7f00:1"),
    *("100::1", "3fff::1"),
]
OPEN = [
    "1.1.1.1",
    "8.8.8.8",
    "99.255.1.1",
    "2606:4700:4700::1111",
    "2a04:4e42::223",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
]


@pytest.mark.parametrize("text", CLOSED)
def test_what_is_not_the_public_internets_is_refused(text: str) -> None:
    """In whatever form an address hides another one."""
    assert addresses.why_not(ipaddress.ip_address(text)) is not None


@pytest.mark.parametrize("text", OPEN)
def test_public_addresses_are_let_through(text: str) -> None:
    """Also where they are translated."""
    assert addresses.why_not(ipaddress.ip_address(text)) is None


def test_the_operator_opens_private_addresses_and_never_metadata() -> None:
    """His own network, and nothing that tells a cloud's machine its secrets."""
    opened = [text for text in CLOSED if addresses.why_not(ipaddress.ip_address(text), private=True) is None]
    assert opened == [
        *("10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
        *("::1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "fc00::1"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("2130706433", "0x7f000001", "0x7f.1", "127.1", "0177.0.0.1", "127.0.0.1.", "1.2.3.0x4", "::1", "[1.2.3.4]"),
        *("", ".", "a..b", "-a.b", "a b", "a/b", "fe80::1%lo", "[fe80::1%25lo]", "a" * 64, "a." * 130, "x\0y", "*"),
    ],
)
def test_numbers_that_only_some_take_for_addresses_are_no_hosts(text: str) -> None:
    """So none means one thing to us and another to the resolver."""
    with pytest.raises(ValueError, match="no host"):
        read_host(text)


def test_hosts_are_compared_in_one_form() -> None:
    """Small letters, no dot at the end, names of other scripts as DNS has them."""
    assert read_host("PyPI.org.") == "pypi.org"
    assert read_host("bücher.example") == "xn--bcher-kva.example"
    assert read_host("[::1]") == ipaddress.ip_address("::1")


@pytest.mark.parametrize(
    ("allow", "deny", "host", "port", "why"),
    [
        (["pypi.org"], [], "pypi.org", 443, None),
        (["pypi.org"], [], "pypi.org", 80, None),
        (["pypi.org"], [], "pypi.org", 22, "port 22 is not allowed"),
        (["pypi.org"], [], "evilpypi.org", 443, "the host is not allowed"),
        (["pypi.org"], [], "pypi.org.evil.example", 443, "the host is not allowed"),
        (["*.example.com"], [], "a.b.example.com", 443, None),
        (["*.example.com"], [], "example.com", 443, "the host is not allowed"),
        (["*.example.com"], [], "badexample.com", 443, "the host is not allowed"),
        (["git.example.com:22"], [], "git.example.com", 22, None),
        (["git.example.com:22"], [], "git.example.com", 443, "port 443 is not allowed"),
        (["*"], ["*.example.com"], "a.example.com", 443, "the host is denied"),
        (["*"], ["*.example.com:443"], "a.example.com", 80, None),
        (["8.8.8.0/24"], [], "8.8.8.8", 443, None),
        (["8.8.8.0/24"], [], "8.8.9.8", 443, "the host is not allowed"),
        (["[2606:4700::]:8443"], [], "[2606:4700::]", 8443, None),
        ([], [], "pypi.org", 443, "the host is not allowed"),
    ],
)
def test_hosts_and_ports(allow: list[str], deny: list[str], host: str, port: int, why: str | None) -> None:
    """Names are whole names, ports are 80 and 443 unless named, and what is denied is denied."""
    policy = NetworkPolicy(allow=tuple(allow), deny=tuple(deny))
    assert Rules(policy).why_not(read_host(host), port) == why


def test_denied_blocks_hold_for_the_addresses_of_names() -> None:
    """Whatever name leads there."""
    found = Rules(NetworkPolicy(allow=("*",), deny=("1.1.1.0/24",)))
    assert found.address_why_not(ipaddress.ip_address("1.1.1.1"), 443) == "a denied address"
    assert found.address_why_not(ipaddress.ip_address("1.1.2.1"), 443) is None


@pytest.mark.parametrize(
    "policy",
    [
        {"allow": ["https://pypi.org"]},
        {"allow": ["pypi.org:0"]},
        {"allow": ["pypi.org:99999"]},
        {"allow": ["*.*.org"]},
        {"allow": ["10.0.0.1/8"]},
        {"allow": ["127.1"]},
        {"allow": ["x"] * 1000},
        {"headers": {"*.example.com": {"A": "b"}}},
        {"headers": {"8.8.8.8": {"A": "b"}}},
        {"headers": {"example.com": {}}},
        {"headers": {"example.com": {"Host": "other"}}},
        {"headers": {"example.com": {"A b": "c"}}},
        {"headers": {"example.com": {"A": "b\r\nC: d"}}},
        {"headers": {"example.com": {"A": "ü"}}},
        {"max_bytes": -1},
        {"allow": "pypi.org"},
        {"allows": []},
    ],
)
def test_policies_that_make_no_sense_are_refused(policy: dict[str, object]) -> None:
    """Before a sandbox is made, with the cure."""
    with pytest.raises(InvalidRequestError) as raised:
        Egress().check(NetworkPolicy.from_json(policy), principal=None)
    assert raised.value.hint


@pytest.mark.parametrize(
    ("bound", "asked", "inside"),
    [
        ("*", "*", True),
        ("*", "8.8.8.8", True),
        ("pypi.org", "*", False),
        ("pypi.org", "pypi.org:22", True),
        ("pypi.org:443", "pypi.org", False),
        ("*.example.com", "*.a.example.com", True),
        ("*.example.com", "*.example.com", True),
        ("*.example.com", "example.com", False),
        ("a.example.com", "*.example.com", False),
        ("8.0.0.0/8", "8.8.0.0/16", True),
        ("8.8.0.0/16", "8.0.0.0/8", False),
        ("example.com", "8.8.8.8", False),
    ],
)
def test_nobody_asks_for_more_than_the_operator_allows(bound: str, asked: str, inside: bool) -> None:
    """Pattern by pattern."""
    assert Pattern.read(bound).covers(Pattern.read(asked)) is inside


def test_principals_have_bounds_of_their_own_and_headers_count() -> None:
    """Nothing by default; what gets headers is asked for as well, and so is the operator's index."""
    egress = Egress(EgressBounds(principals=("api.example.com",), index=Index(urls=("https://index.example.com/",))))
    allowed = NetworkPolicy(headers={"api.example.com": {"Authorization": Secret("s")}})
    assert egress.check(allowed, principal="ann").headers == allowed.headers
    for more in (NetworkPolicy(allow=("pypi.org",)), NetworkPolicy(packages=True)):
        with pytest.raises(InvalidRequestError, match="cannot be reached"):
            egress.check(more, principal="ann")
        assert egress.check(more, principal=None) == more


def test_secrets_are_written_down_nowhere() -> None:
    """Not in JSON, and so not on disk or on the wire, and not in what is logged; who reads that knows it is missing."""
    spec = SandboxSpec.from_json({"python": "", "network": {"headers": {"a.example": {"Authorization": "hush"}}}})
    assert spec.network == "none"
    assert spec.egress is not None
    assert spec.egress.headers["a.example"]["Authorization"] == "hush"
    assert "hush" not in json.dumps(spec.to_json()) + repr(spec)
    again = SandboxSpec.from_json(spec.to_json())
    assert again.egress is not None
    found = Rules(again.egress).headers("a.example", 443)
    assert found is not None
    assert not rules.known(found)


def test_an_indexs_password_stays_on_the_host() -> None:
    """pip is told a URL without it; the proxy adds it, over TLS alone."""
    index = Index(urls=("https://ann:p%40ss@index.example.com:8443/simple", "http://ann:x@plain.example.com/simple"))
    assert index.variables()["PIP_INDEX_URL"] == "https://index.example.com:8443/simple"
    assert "ann" not in json.dumps(index.variables())
    assert dict(index.headers) == {"index.example.com:8443": {"authorization": "Basic YW5uOnBAc3M="}}


@pytest.mark.parametrize("denied", ["8.8.8.0/24", "8.8.8.8", "::ffff:8.8.8.0/120", "[64:ff9b::808:808]"])
@pytest.mark.parametrize("text", ["8.8.8.8", "[::ffff:8.8.8.8]", "[64:ff9b::808:808]"])
def test_an_address_within_another_is_denied_with_it(denied: str, text: str) -> None:
    """Whichever form the policy, the sandbox or a name's entry has: it is the IPv4 address that is reached."""
    read = Rules(NetworkPolicy(allow=("*",), deny=(denied,)))
    host = read_host(text)
    assert not isinstance(host, str)
    assert read.why_not(host, 443) == "the host is denied"
    assert read.address_why_not(host, 443) == "a denied address"
    other = ipaddress.ip_address("::ffff:8.8.4.4")
    assert read.why_not(other, 443) is None
    assert read.address_why_not(other, 443) is None
