# SPDX-License-Identifier: Apache-2.0
"""libvirt's save image header."""

import struct

import pytest

from nova_snowflock import exception
from nova_snowflock.virt.qemu import save_image


def test_round_trip() -> None:
    data = save_image.header("<domain>\N{SNOWFLAKE}</domain>", running=True) + b"QEVM..."
    image = save_image.parse(data)
    assert image == save_image.SaveImage("<domain>\N{SNOWFLAKE}</domain>", True, b"QEVM...")


def test_layout() -> None:
    # struct _virQEMUSaveHeader has 92 bytes; the XML ends with a NUL.
    data = save_image.header("<domain/>", running=False)
    assert data[:16] == b"LibvirtQemudSave"
    assert struct.unpack_from("=5I", data, 16) == (2, 10, 0, 0, 0)
    assert data[36:92] == bytes(56)
    assert data[92:] == b"<domain/>\0"


def changed(offset: int, value: int) -> bytes:
    data = bytearray(save_image.header("<domain/>", running=True))
    struct.pack_into("=I", data, offset, value)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (bytes(92), "magic"),
        (changed(16, 3), "version 3"),
        (changed(20, 11), "not all there"),
        (changed(20, 0), "not all there"),
        (changed(28, 1), "compressed"),
        (save_image.header("<domain/>", running=True).replace(b"<", b"\xff"), "UTF-8"),
    ],
)
def test_refused_with_what_is_wrong(data: bytes, reason: str) -> None:
    with pytest.raises(exception.InvalidStream, match=reason):
        save_image.parse(data)
