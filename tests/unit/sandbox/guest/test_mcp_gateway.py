"""What the MCP gateway in a sandbox reads: its configuration, and names that servers have in common."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.anything import JSON, LENGTHS, changed, give_anything
from warmcell.sandbox.guest.mcp_gateway import Wanted, Wrong, _prepared, named, wanted


def there(program: str) -> str | None:
    """As `shutil.which`, where one program is."""
    return "/usr/bin/it" if program == "mcp-server-sequential-thinking" else None


def test_servers_are_programs_commands_or_repositories() -> None:
    """Settings that are not the gateway's become variables."""
    config = {
        "sequentialThinking": {"githubPersonalAccessToken": "t", "max": 3},
        "own": {"runCmd": "serve it"},
        "github/some/one.x": {"runCmd": "npm start", "installCmd": "npm install"},
    }
    program, own, cloned = wanted(json.dumps(config), there)
    assert (program.command, program.repository) == ("mcp-server-sequential-thinking", "")
    assert program.env == {"GITHUB_PERSONAL_ACCESS_TOKEN": "t", "MAX": "3"}
    assert (own.command, own.env, own.repository) == ("serve it", {}, "")
    assert (cloned.command, cloned.install) == ("npm start", "npm install")
    assert cloned.repository == "https://github.com/some/one.x"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("{", "not JSON"),
        ("[]", "must be an object"),
        ("{}", "must be an object"),
        ('{"a": 1}', "must be an object"),
        ('{"exa": {}}', "mcp-server-exa"),
        ('{"a/b": {"runCmd": "x"}}', "github/OWNER/REPOSITORY"),
        ('{"github/a/b": {}}', "runCmd"),
        ('{"github/a/../b": {"runCmd": "x"}}', "github/OWNER/REPOSITORY"),
        ('{"a": {"runCmd": ["x"]}}', "runCmd"),
        ('{"a": {"runCmd": "x", "installCmd": 1}}', "installCmd"),
    ],
)
def test_what_is_none_is_refused_with_its_reason(config: str, why: str) -> None:
    """Before anything is cloned or started."""
    with pytest.raises(Wrong, match=why):
        wanted(config, there)


def test_what_two_servers_have_goes_by_the_servers_name() -> None:
    """And no name that is made so is another's."""
    assert named([("x", ["a", "b"]), ("github/o/y", ["a"])]) == {
        "x__a": (0, "a"),
        "b": (0, "b"),
        "github_o_y__a": (1, "a"),
    }
    clash = named([("x", ["a"]), ("y", ["a", "x__a"])])
    assert sorted(clash.values()) == [(0, "a"), (1, "a"), (1, "x__a")]


@LENGTHS
def test_any_configuration_is_servers_or_a_reason(examples: int) -> None:
    """Whatever it is: each server has a command for a shell and variables that can be set."""

    def take(config: str) -> None:
        for one in wanted(config, there):
            assert one.command
            assert not any("\0" in text for text in (one.command, one.install, *one.env, *one.env.values()))
            assert not any(not name or "=" in name for name in one.env)
            for text in (one.name, one.command, one.install, *one.env, *one.env.values()):
                assert text.encode() is not None

    settings = changed({"runCmd": "serve", "installCmd": "npm i", "githubPersonalAccessToken": "t", "max": 3})
    names = st.one_of(st.sampled_from(("sequentialThinking", "own", "github/some/one.x", "github/../..")), st.text())
    configs = st.one_of(st.dictionaries(names, st.one_of(settings, JSON), max_size=3), JSON).map(json.dumps)
    give_anything(
        st.one_of(configs, st.text(max_size=20), st.just("[" * 100_000), st.just('{"a":' * 30_000)),
        take,
        refusals=Wrong,
        examples=examples,
        sound=['{"own": {"runCmd": "serve", "aB": "c"}}'],
        broken=["{", "[" * 100_000, '{"own": {"runCmd": "a\\u0000b"}}', '{"own": {"runCmd": "x", "a=b": "c"}}'],
    )


def test_half_of_a_repository_is_none(tmp_path: Path) -> None:
    """Its clone was killed with the command: the next one begins anew, and what is whole stays."""
    origin, place = tmp_path / "origin", tmp_path / "place"
    for argv in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        origin.mkdir(exist_ok=True)
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *argv], cwd=origin, check=True)
    one = Wanted("github/o/r", "serve", repository=f"file://{origin}")
    killed = (
        "import os, signal, sys\n"
        "from warmcell.sandbox.guest import mcp_gateway as gateway\n"
        "def done(server, command, *_):\n"
        "    os.makedirs(command[-1] + '/half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "gateway._done = done\n"
        "gateway._prepared(sys.argv[1], gateway.Wanted('github/o/r', 'serve', repository='file:///none'))\n"
    )
    assert subprocess.run([sys.executable, "-c", killed, str(place)], check=False).returncode == -9
    made = Path(_prepared(str(place), one))
    assert (made / ".git").is_dir()
    (made / "mine").touch()
    assert Path(_prepared(str(place), one)) == made
    assert (made / "mine").exists()
