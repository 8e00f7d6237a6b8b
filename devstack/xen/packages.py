# SPDX-License-Identifier: Apache-2.0
"""Debian packages and sources, from wherever this machine's apt has Debian's.

What is installed on this machine does not matter, and nothing is.
"""

from collections.abc import Sequence
import pathlib
import re

from devstack.xen import commands

CONFIGURATION = """\
Dir::State::lists "{root}/lists/";
Dir::State::status "{root}/status";
Dir::Cache "{root}/";
Dir::Etc::sourcelist "{root}/sources.list";
Dir::Etc::sourceparts "/dev/null";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
"""


class Archive:
    """Debian's archive as it is now. `root` is a directory for apt's files."""

    def __init__(self, root: pathlib.Path) -> None:
        """:raises XenError: apt knows no archive of Debian, or does not reach it"""
        self._root = root
        for part in ("lists/partial", "archives/partial"):
            (root / part).mkdir(parents=True)
        (root / "status").touch()
        (root / "sources.list").write_text(_sources())
        (root / "apt.conf").write_text(CONFIGURATION.format(root=root))
        self._apt("update")

    def download(self, names: Sequence[str]) -> list[pathlib.Path]:
        """These packages and all that they depend on, as files.

        :raises XenError: there is no such package, or it cannot be had
        """
        self._apt("--download-only", "install", *names)
        return sorted((self._root / "archives").glob("*.deb"))

    def source(self, name: str, version: str, directory: pathlib.Path) -> pathlib.Path:
        """The source of a package, with Debian's patches, unpacked in a new directory.

        It is of that version, or where that cannot be had (any more), of another.

        :raises XenError: none can be had
        """
        directory.mkdir()
        for candidate in dict.fromkeys((version, *self._versions(name))):
            try:
                self._apt("source", f"{name}={candidate}", cwd=directory)
            except commands.XenError as error:
                failure = error
                continue
            (tree,) = (path for path in directory.iterdir() if path.is_dir())
            return tree
        raise failure

    def _versions(self, name: str) -> list[str]:
        """Of the source of a package; those of the updates of a release are before its own."""
        listing = self._run("apt-cache", "showsrc", "--only-source", name)
        return re.findall(r"^Version: (.*)$", listing, re.MULTILINE)[::-1]

    def _apt(self, *argv: str, cwd: pathlib.Path | None = None) -> None:
        self._run("apt-get", "--yes", "--quiet=2", *argv, cwd=cwd)

    def _run(self, *argv: str, cwd: pathlib.Path | None = None) -> str:
        environment = {"APT_CONFIG": str(self._root / "apt.conf")}
        return commands.run(argv, cwd=cwd, environment=environment)


def _sources() -> str:
    """A sources.list of Debian alone, of packages and of their sources."""
    listing = commands.run(
        [
            *("apt-get", "indextargets", "--format"),
            "$(SIGNED_BY)|$(REPO_URI) $(RELEASE) $(COMPONENT)",
            *("Created-By: Packages", "Origin: Debian"),
        ]
    )
    if not listing.strip():
        raise commands.XenError("apt knows no packages of Debian: `apt-get update` may help")
    lines = []
    for line in listing.splitlines():
        signed_by, _, place = line.partition("|")
        # apt tells of keys only if they are not its usual ones.
        options = f"[signed-by={signed_by}] " if signed_by.startswith("/") else ""
        lines += [f"{kind} {options}{place}\n" for kind in ("deb", "deb-src")]
    return "".join(lines)
