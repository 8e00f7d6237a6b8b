# SPDX-License-Identifier: Apache-2.0
"""What the API does without Nova's services; tests/functional has the rest."""

import types
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import nova.conf
import nova.exception
import pytest

from nova_snowflock import conf
from nova_snowflock.api import cloning
from nova_snowflock.api import family
from nova_snowflock.api import forking
from nova_snowflock.api import router
from nova_snowflock.virt import rpc

conf.register_opts(nova.conf.CONF)

PARENT = "parent"


def server(uuid: str, **system_metadata: str) -> Any:
    return types.SimpleNamespace(uuid=uuid, system_metadata=system_metadata, display_name=uuid)


def clone(number: int, fork: str, parent: str = PARENT) -> Any:
    marks = {rpc.FORK: fork, rpc.HOST: "h1", rpc.PARENT: parent, rpc.CLONE_ID: str(number)}
    return server(f"clone-{number}-of-{fork}", **marks)


def test_a_server_that_was_never_forked() -> None:
    assert family.forks_of(server(PARENT, image_min_disk="1")) == {}
    assert family.origin_of(server(PARENT)) is None


def test_forks_of_a_parent() -> None:
    parent = server(PARENT, **{f"{rpc.FORK_PREFIX}a": "h1", f"{rpc.FORK_PREFIX}b": "h2"})
    assert family.forks_of(parent) == {
        "a": family.Fork("a", PARENT, "h1"),
        "b": family.Fork("b", PARENT, "h2"),
    }


def test_forks_without_images_are_known_to_clones() -> None:
    clones = [clone(1, "a"), clone(2, "a"), clone(1, "x", parent="another")]
    assert family.forks_of(server(PARENT), clones) == {"a": family.Fork("a", PARENT, "h1")}


def test_a_clone_that_is_a_parent() -> None:
    both = clone(3, "a")
    both.system_metadata[f"{rpc.FORK_PREFIX}b"] = "h2"
    assert family.forks_of(both) == {
        "a": family.Fork("a", PARENT, "h1"),
        "b": family.Fork("b", both.uuid, "h2"),
    }
    assert family.clone_id_of(both) == 3


@given(st.text(min_size=1, max_size=255), st.integers(1, 999_999))
def test_default_names(name: str, number: int) -> None:
    parent = types.SimpleNamespace(display_name=name)
    made = forking._namer(parent, {})(number)
    assert len(made) <= 255
    assert made.endswith(f"-clone-{number}")
    assert name.startswith(made.removesuffix(f"-clone-{number}"))


@pytest.mark.parametrize(
    ("template", "expected"),
    [("w{n}", "w7"), ("{n}{n}", "77"), ("{0}{n!r}{{", "{0}{n!r}{{"), ("one", "one")],
)
def test_templates_are_no_formats(template: str, expected: str) -> None:
    assert forking._namer(server(PARENT), {"name": template})(7) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"count": 64, "name": "{n}"},
        {"count": 0, "checkpoint": True},
        {"count": 1, "checkpoint": True, "keep": 0},
        {"fork_id": "f", "count": 2},
        {"networks": "none"},
        {"networks": [{"uuid": "n", "fixed_ip": "192.0.2.1"}, {"port": "p"}]},
    ],
)
def test_valid(options: dict[str, Any]) -> None:
    assert forking.invalid(options) is None


def test_the_limit_is_an_option() -> None:
    nova.conf.CONF.set_override("max_clones", 3, group="snowflock")
    try:
        assert forking.invalid({"count": 3}) is None
        assert forking.invalid({"count": 4}) == "At most 3 clones can be made at once, not 4."
    finally:
        nova.conf.CONF.clear_override("max_clones", group="snowflock")


def test_no_place_for_the_action() -> None:
    moved: Any = types.SimpleNamespace(map=types.SimpleNamespace(matchlist=[]))
    with pytest.raises(RuntimeError, match="release of Nova"):
        router.APIRouter._resources_of_servers(moved)


def test_security_groups_of_ports() -> None:
    """Nova gives new ports all the same."""
    alike: list[dict[str, Any]] = [{"security_groups": ["a", "b"]}, {"security_groups": ["b", "a"]}]
    assert cloning.inherited_security_groups(alike) == ["a", "b"]
    assert cloning.inherited_security_groups([]) == []
    assert cloning.inherited_security_groups([{}]) == []
    with pytest.raises(nova.exception.InvalidInput, match="different security groups"):
        cloning.inherited_security_groups([*alike, {"security_groups": ["a"]}])
