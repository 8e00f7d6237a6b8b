# SPDX-License-Identifier: Apache-2.0
"""Who may do what with forks."""

from nova.policies import base
import nova.policy
from oslo_policy import policy

_ROOT = "os_compute_api:snowflock:forks:%s"
CREATE = _ROOT % "create"
INDEX = _ROOT % "index"
SHOW = _ROOT % "show"
SHOW_HOST = _ROOT % "show:host"
DELETE = _ROOT % "delete"
RELEASE = _ROOT % "release"

_FORKS = "/servers/{server_id}/forks"
_FORK = "/servers/{server_id}/forks/{fork_id}"


def _rule(name: str, check: str, description: str, method: str, path: str) -> policy.RuleDefault:
    return policy.DocumentedRuleDefault(
        name=name,
        check_str=check,
        description=description,
        operations=[{"method": method, "path": path}],
        scope_types=["project"],
    )


_RULES = [
    _rule(
        CREATE,
        base.PROJECT_MEMBER_OR_ADMIN,
        "Fork a server, or make more clones from one of its forks",
        "POST",
        "/servers/{server_id}/action (fork)",
    ),
    _rule(INDEX, base.PROJECT_READER_OR_ADMIN, "List the forks of a server", "GET", _FORKS),
    _rule(SHOW, base.PROJECT_READER_OR_ADMIN, "Show a fork and its clones", "GET", _FORK),
    _rule(SHOW_HOST, base.ADMIN, "See the hosts of a fork's image and clones", "GET", _FORK),
    _rule(
        DELETE,
        base.PROJECT_MEMBER_OR_ADMIN,
        "Delete all clones of a fork and release its image",
        "DELETE",
        _FORK,
    ),
    _rule(
        RELEASE,
        base.PROJECT_MEMBER_OR_ADMIN,
        "Release the image of a fork and keep its clones",
        "POST",
        _FORK + "/action (release)",
    ),
]


def list_rules() -> list[policy.RuleDefault]:
    """The rules, for oslo.policy's generators (entry point oslo.policy.policies)."""
    return _RULES


def register() -> None:
    """Have Nova's enforcer know the rules. It must not be asked about them before."""
    nova.policy.init()
    enforcer = nova.policy._ENFORCER
    enforcer.register_defaults(
        [rule for rule in _RULES if rule.name not in enforcer.registered_rules]
    )
