# SPDX-License-Identifier: Apache-2.0
"""Makes ``snowflock-guest.pyz``: this package in one file, which a guest's Python runs.

Always the same bytes from the same sources, whoever makes it and when.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import io
import os
import pathlib
import sys
import zipfile

SHEBANG = b"#!/usr/bin/env python3\n"

_MAIN = b"""\
# SPDX-License-Identifier: Apache-2.0
import sys

from nova_snowflock.guest import bundled

sys.exit(bundled.main())
"""


def build() -> bytes:
    """The bundle's bytes."""
    buffer = io.BytesIO(SHEBANG)
    buffer.seek(0, os.SEEK_END)
    # Stored: compressors differ between machines, and minimal Pythons are without.
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_STORED) as bundle:
        for name, data in sorted(_members()):
            member = zipfile.ZipInfo(name)  # as of 1980, whenever it was written
            member.create_system = 3  # Unix
            member.external_attr = 0o100644 << 16
            bundle.writestr(member, data)
    return buffer.getvalue()


def _members() -> Iterator[tuple[str, bytes]]:
    guest = pathlib.Path(__file__).parent
    package = guest.parent
    yield "__main__.py", _MAIN
    paths = [package / "__init__.py", *guest.glob("*.py")]
    paths += [*(guest / "files").iterdir(), *(guest / "bindings").iterdir()]
    for path in paths:
        if path.is_file():
            yield f"{package.name}/{path.relative_to(package).as_posix()}", path.read_bytes()


def main() -> int:
    """Entry point of ``python3 -m nova_snowflock.guest.bundle``."""
    parser = argparse.ArgumentParser(description="Make snowflock-guest.pyz, to be put into guests.")
    parser.add_argument("output", metavar="<file>", type=pathlib.Path)
    arguments = parser.parse_args()
    try:
        arguments.output.write_bytes(build())
        arguments.output.chmod(0o755)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
