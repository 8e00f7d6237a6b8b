# SPDX-License-Identifier: Apache-2.0
"""``snowflock``: SnowFlock's API for shell scripts. They are forked like any program.

It prints plain values, separated by blanks, and ends with a status that says what went wrong::

    set -- $(snowflock fork 8)          # clone ID and ticket
    if [ "$1" != 0 ]; then
        work "$1" >result
        snowflock exit 0 --result result
    fi
    snowflock join "$2" --directory results
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import json
import os
import sys
from typing import Any

from nova_snowflock.guest import client

STATUSES: dict[type[client.SnowFlockError], int] = {
    client.Refused: 3,
    client.Invalid: 4,
    client.Failed: 5,
    client.Busy: 6,
    client.Forked: 7,
    client.Offline: 8,
    client.NoAgent: 9,
}
"""By kind of error. 1 is that of files, and 2 that of wrong usage."""

OTHER = 10
"""The agent's answer made no sense."""

UNSUCCESSFUL = 11
"""Of ``join``: a clone did not exit with 0."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``snowflock``.

    :param argv: the arguments, in place of the process's
    """
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except client.SnowFlockError as error:
        print(f"snowflock: {error}", file=sys.stderr)
        return STATUSES.get(type(error), OTHER)
    except OSError as error:
        print(f"snowflock: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as shells have it
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="snowflock",
        description="Fork the machine that this runs on.",
        epilog="Exit status: 1 a file could not be read or written, 2 usage, 3 refused, 4 invalid, "
        "5 failed (may be tried again), 6 busy, 7 this is a clone and its parent had asked, "
        "8 the host knows nothing of forks, 9 no agent, 10 no proper answer, "
        "11 a joined clone did not exit with 0.",
    )
    commands = parser.add_subparsers(metavar="<command>", required=True)

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    def add_params(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--param",
            metavar="<key=value>",
            action="append",
            type=_param,
            dest="params",
            help="What the clones are told (repeat it for more)",
        )

    command = add("request-ticket", _request_ticket, "Print a ticket and for how many clones it is")
    command.add_argument("n", metavar="<n>", type=int, help="How many clones to ask for")
    command = add("clone", _clone, "Fork; print 0 in the parent, and the clone ID in a clone")
    command.add_argument("ticket", metavar="<ticket>")
    add_params(command)
    command = add("checkpoint", _checkpoint, "Print a checkpoint, and 0 or the clone ID")
    add_params(command)
    command = add("create-clones", _create_clones, "Make clones of a checkpoint")
    command.add_argument("checkpoint", metavar="<checkpoint>")
    command.add_argument("ticket", metavar="<ticket>")
    command = add("exit", _exit, "End this clone; does not return")
    command.add_argument("status", metavar="<status>", type=int, nargs="?", default=0)
    command.add_argument("--result", metavar="<file>", help="What the parent gets (-: stdin)")
    command = add(
        "join",
        _join,
        "Wait for the clones of a ticket; print a line for each: its ID, its status or -, the "
        "bytes of its result, and an error if there was one",
    )
    command.add_argument("ticket", metavar="<ticket>")
    command.add_argument("--directory", metavar="<directory>", help="For results: files 1, 2, ...")
    command = add("kill", _kill, "Stop the clones of a ticket")
    command.add_argument("ticket", metavar="<ticket>")
    command = add("release", _release, "Keep a checkpoint no longer")
    command.add_argument("checkpoint", metavar="<checkpoint>")
    command = add("info", _info, "Print what this server is")
    command.add_argument("--json", action="store_true", help="As one JSON object")
    command = add(
        "fork", _fork, "Ask for a ticket and fork; print 0 or the clone ID, and the ticket"
    )
    command.add_argument("n", metavar="<n>", type=int, nargs="?", default=1)
    add_params(command)
    return parser


def _param(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not <key=value>")
    return name, value


def _params(arguments: argparse.Namespace) -> dict[str, str] | None:
    return dict(arguments.params) if arguments.params else None


def _request_ticket(arguments: argparse.Namespace) -> int:
    ticket = client.request_ticket(arguments.n)
    print(ticket.id, ticket.n)
    return 0


def _clone(arguments: argparse.Namespace) -> int:
    print(client.clone(arguments.ticket, _params(arguments)))
    return 0


def _checkpoint(arguments: argparse.Namespace) -> int:
    checkpoint = client.checkpoint_parent(_params(arguments))
    print(checkpoint.id, checkpoint.clone_id)
    return 0


def _create_clones(arguments: argparse.Namespace) -> int:
    client.create_clones(arguments.checkpoint, arguments.ticket)
    return 0


def _exit(arguments: argparse.Namespace) -> int:
    result = b""
    if arguments.result == "-":
        result = sys.stdin.buffer.read()
    elif arguments.result is not None:
        with open(arguments.result, "rb") as file:
            result = file.read()
    client.exit(arguments.status, result)


def _join(arguments: argparse.Namespace) -> int:
    if arguments.directory is not None:
        os.makedirs(arguments.directory, exist_ok=True)
    clones = client.join(arguments.ticket)
    for clone in clones:
        if arguments.directory is not None:
            with open(os.path.join(arguments.directory, str(clone.clone_id)), "wb") as file:
                file.write(clone.result)
        status = "-" if clone.status is None else clone.status
        error = [] if clone.error is None else [" ".join(clone.error.split())]
        print(clone.clone_id, status, len(clone.result), *error)
    return 0 if all(clone.status == 0 for clone in clones) else UNSUCCESSFUL


def _kill(arguments: argparse.Namespace) -> int:
    client.kill(arguments.ticket)
    return 0


def _release(arguments: argparse.Namespace) -> int:
    client.release(arguments.checkpoint)
    return 0


def _info(arguments: argparse.Namespace) -> int:
    info = client.info()
    tickets = [
        {"ticket": held.ticket.id, "n": held.ticket.n, "state": held.state} for held in info.tickets
    ]
    if arguments.json:
        print(json.dumps({**info._asdict(), "tickets": tickets}))
        return 0
    for name in ("server", "clone_id", "fork", "parent", "limit"):
        value = getattr(info, name)
        print(name, "-" if value is None else value)
    for name, value in sorted(info.params.items()):
        print("param", f"{name}={value}")
    for ticket in tickets:
        print("ticket", ticket["ticket"], ticket["n"], ticket["state"])
    return 0


def _fork(arguments: argparse.Namespace) -> int:
    clone_id, ticket = client.fork(arguments.n, _params(arguments))
    print(clone_id, ticket.id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
