# SPDX-License-Identifier: Apache-2.0
"""The commands."""

import argparse
import base64
from collections.abc import Iterable, Sequence
import sys
from typing import Any

from cliff import columns
from openstack import exceptions as sdk_exceptions
from openstackclient import command
from osc_lib import exceptions
from osc_lib.cli import parseractions

from nova_snowflock.osc import client
from nova_snowflock.osc import progress

_FORK_COLUMNS = ("id", "parent_id", "state", "created_at")
_DETAILS = (
    *_FORK_COLUMNS,
    "reason",
    "checkpoint",
    "keep",
    "params",
    "size",
    "problems",
    "users",
    "method",
    "pause",
    "stages",
    "after",
    "host",
)


class ClonesColumn(columns.FormattableColumn[list[dict[str, Any]]]):
    """Clones: one in a line, or as the API has them."""

    def human_readable(self) -> str:
        """What a table shows."""
        return "\n".join(_clone_line(clone) for clone in self._value)


class MappingColumn(columns.FormattableColumn[dict[str, Any]]):
    """Names and values: one in a line, or as the API has them."""

    def human_readable(self) -> str:
        """What a table shows."""
        return "\n".join(f"{name}={value}" for name, value in sorted(self._value.items()))


class CreateFork(command.ShowOne):
    """Fork a running server: make clones that continue where it is.

    With --fork, make more clones of a fork that has been made earlier, as it was then.
    """

    _parser: argparse.ArgumentParser
    _failed: dict[str, str]

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its options."""
        parser = super().get_parser(prog_name)
        parser.add_argument("server", metavar="<server>", help="Server to fork (name or ID)")
        parser.add_argument(
            "--count",
            metavar="<count>",
            type=_count,
            help="How many clones to make (default: 1; 0 is for --checkpoint)",
        )
        parser.add_argument(
            "--name",
            metavar="<template>",
            help="Name of the clones; {n} in it becomes the number of each "
            "(default: <server>-clone-{n})",
        )
        parser.add_argument(
            "--wait", action="store_true", help="Wait until all clones are ACTIVE or have failed"
        )
        existing = parser.add_mutually_exclusive_group()
        existing.add_argument(
            "--fork",
            metavar="<fork>",
            help="Make more clones of this fork (ID); <server> may be one of its clones",
        )
        existing.add_argument(
            "--checkpoint",
            action="store_true",
            help="Keep the fork until it is released; with --count 0, make no clones now",
        )
        parser.add_argument(
            "--network",
            metavar="<network>",
            action=_NetworkAction,
            dest="networks",
            key="uuid",
            help="Network of an interface, in place of the parent's (name or ID); repeat it for "
            "each interface, in order",
        )
        parser.add_argument(
            "--port",
            metavar="<port>",
            action=_NetworkAction,
            dest="networks",
            key="port",
            help="Port of an interface, for a single clone (name or ID); see --network",
        )
        parser.add_argument(
            "--isolation",
            choices=("none", "family"),
            help="family: the clones are in a network of their own, behind the router of their "
            "parent's, where nobody but they and their parent hear each other",
        )
        parser.add_argument(
            "--security-group",
            metavar="<security-group>",
            action="append",
            dest="security_groups",
            help="Security group, in place of the parent's (name or ID; repeat it for more)",
        )
        parser.add_argument(
            "--availability-zone",
            metavar="<zone>",
            help="Availability zone of the clones (default: the parent's, if it was created in a "
            "chosen one); administrators may add :<host>",
        )
        parser.add_argument(
            "--hint",
            metavar="<key=value>",
            action=parseractions.KeyValueAppendAction,
            dest="hints",
            help="Hint for the scheduler (repeat it for more)",
        )
        parser.add_argument(
            "--key-name", metavar="<key-name>", help="Key pair, in place of the parent's"
        )
        parser.add_argument(
            "--user-data",
            metavar="<file>",
            help="File of user data, in place of the parent's",
        )
        parser.add_argument(
            "--property",
            metavar="<key=value>",
            action=parseractions.KeyValueAction,
            dest="properties",
            help="Property of the clones, beside the parent's (repeat it for more)",
        )
        parser.add_argument(
            "--param",
            metavar="<key=value>",
            action=parseractions.KeyValueAction,
            dest="params",
            help="What the clones' guests will be told (repeat it for more)",
        )
        parser.add_argument(
            "--population",
            choices=["lazy", "background", "eager"],
            help="How the clones' hosts get the memory that the clones have not touched "
            "(default: as configured there)",
        )
        parser.add_argument(
            "--keep",
            metavar="<seconds>",
            type=_seconds,
            help="How long the fork outlives its last clone's need of it",
        )
        self._parser = parser
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], Iterable[Any]]:
        """Do it."""
        self._check(parsed_args)
        compute = self.app.client_manager.compute
        options = self._options(parsed_args)
        server = _find_server(compute, parsed_args.server)
        fork = client.Forks(compute, server.id).create(options)
        self._failed = {}
        if parsed_args.wait and fork["clones"]:
            bar = progress.Progress(sys.stderr, len(fork["clones"]))
            self._failed = progress.wait(compute, fork["clones"], bar)
        return _row(fork, _FORK_COLUMNS)

    def run(self, parsed_args: argparse.Namespace) -> int:
        """
        :returns: the exit code: 1 if it was waited for clones of which some failed
        """
        status: int = super().run(parsed_args)
        for name, reason in self._failed.items():
            sys.stderr.write(f"{name} failed: {reason}\n")
        return 1 if self._failed else status

    def _check(self, parsed_args: argparse.Namespace) -> None:
        if parsed_args.count == 0 and not parsed_args.checkpoint:
            self._parser.error("argument --count: 0 is for --checkpoint only")
        if parsed_args.fork:
            flags = {"params": "--param", "keep": "--keep", "isolation": "--isolation"}
            for option, flag in flags.items():
                if getattr(parsed_args, option) is not None:
                    self._parser.error(f"argument {flag}: not allowed with argument --fork")
        several = parsed_args.count is not None and parsed_args.count > 1
        if several and parsed_args.name is not None and "{n}" not in parsed_args.name:
            self._parser.error("argument --name: it must contain {n} with several clones")

    def _options(self, parsed_args: argparse.Namespace) -> dict[str, Any]:
        options = {
            "count": parsed_args.count,
            "name": parsed_args.name,
            "fork_id": parsed_args.fork,
            "checkpoint": parsed_args.checkpoint or None,
            "availability_zone": parsed_args.availability_zone,
            "key_name": parsed_args.key_name,
            "metadata": parsed_args.properties,
            "params": parsed_args.params,
            "isolation": parsed_args.isolation,
            "population": parsed_args.population,
            "keep": parsed_args.keep,
        }
        if parsed_args.hints is not None:
            options["hints"] = {
                key: values[0] if len(values) == 1 else values
                for key, values in parsed_args.hints.items()
            }
        if parsed_args.user_data is not None:
            options["user_data"] = _read_user_data(parsed_args.user_data)
        if parsed_args.networks is not None:
            options["networks"] = [
                {key: self._find_network(key, name)} for key, name in parsed_args.networks
            ]
        if parsed_args.security_groups is not None:
            network = self.app.client_manager.network
            options["security_groups"] = [
                {"name": network.find_security_group(group, ignore_missing=False).id}
                for group in parsed_args.security_groups
            ]
        return {key: value for key, value in options.items() if value is not None}

    def _find_network(self, key: str, name: str) -> str:
        network = self.app.client_manager.network
        find = network.find_network if key == "uuid" else network.find_port
        found: str = find(name, ignore_missing=False).id
        return found


class ListForks(command.Lister):
    """List the forks of a server, or the fork that it is a clone of"""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its options."""
        parser = super().get_parser(prog_name)
        parser.add_argument("server", metavar="<server>", help="Server (name or ID)")
        return parser

    def take_action(
        self, parsed_args: argparse.Namespace
    ) -> tuple[Sequence[str], Iterable[Sequence[Any]]]:
        """Do it."""
        compute = self.app.client_manager.compute
        server = _find_server(compute, parsed_args.server)
        headers = ("ID", "Parent", "State", "Created At", "Checkpoint", "Clones")
        fields = ("id", "parent_id", "state", "created_at", "checkpoint", "clones")
        forks = client.Forks(compute, server.id).list()
        return headers, [
            tuple(_column(field, fork.get(field)) for field in fields) for fork in forks
        ]


class ShowFork(command.ShowOne):
    """Show a fork: its image, and how far its clones' hosts have it"""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its options."""
        return _with_fork(super().get_parser(prog_name))

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], Iterable[Any]]:
        """Do it."""
        forks = _forks(self.app, parsed_args)
        fork = forks.get(parsed_args.fork)
        return _row(fork, [key for key in _DETAILS if key in fork])


class DeleteFork(command.Command):
    """Delete forks: all of their clones, and their images"""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its options."""
        parser = super().get_parser(prog_name)
        parser.add_argument("server", metavar="<server>", help="Parent or clone (name or ID)")
        parser.add_argument("forks", metavar="<fork>", nargs="+", help="Fork (ID)")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Do it."""
        forks = _forks(self.app, parsed_args)
        failed = []
        for fork in parsed_args.forks:
            try:
                forks.delete(fork)
            except sdk_exceptions.HttpException as error:
                failed.append(fork)
                sys.stderr.write(f"Fork {fork} was not deleted: {error.details or error}\n")
        if failed:
            raise exceptions.CommandError(
                f"{len(failed)} of {len(parsed_args.forks)} forks were not deleted."
            )


class ReleaseFork(command.Command):
    """Release the image of a fork; its clones stay"""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """Its options."""
        parser = _with_fork(super().get_parser(prog_name))
        parser.add_argument(
            "--force",
            action="store_true",
            help="Even if clones still need it: they lose what they have not fetched",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Do it."""
        _forks(self.app, parsed_args).release(parsed_args.fork, force=parsed_args.force)


class _NetworkAction(argparse.Action):
    """Collects interfaces in the order they are given, whatever kind they are."""

    def __init__(self, *args: Any, key: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._key = key

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*given, (self._key, values)])


def _count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError(f"{count} is less than 0")
    return count


_seconds = _count


def _read_user_data(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return base64.b64encode(file.read()).decode()
    except OSError as error:
        raise exceptions.CommandError(f"The user data cannot be read: {error}") from error


def _find_server(compute: Any, name: str) -> Any:
    return compute.find_server(name, ignore_missing=False)


def _with_fork(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("server", metavar="<server>", help="Parent or clone (name or ID)")
    parser.add_argument("fork", metavar="<fork>", help="Fork (ID)")
    return parser


def _forks(app: Any, parsed_args: argparse.Namespace) -> client.Forks:
    compute = app.client_manager.compute
    return client.Forks(compute, _find_server(compute, parsed_args.server).id)


def _row(fork: client.Fork, fields: Iterable[str]) -> tuple[Sequence[str], Iterable[Any]]:
    shown = (*fields, "clones")
    return shown, [_column(field, fork.get(field)) for field in shown]


def _column(field: str, value: Any) -> Any:
    if field == "clones":
        return ClonesColumn(value)
    if isinstance(value, dict):
        return MappingColumn(value)
    return value


def _clone_line(clone: dict[str, Any]) -> str:
    words = [str(clone["clone_id"]), clone["name"], clone["server_id"]]
    words += [clone[key] for key in ("status", "host") if clone.get(key)]
    pages = clone.get("pages")
    if pages and pages["missing"] is not None:
        words.append(
            f"{pages['resident']} resident, {pages['zero']} zero, {pages['missing']} missing pages"
        )
        words.append(f"{clone['faults']} faults")
    if clone.get("population"):
        words.append(clone["population"])
    return " ".join(words)
