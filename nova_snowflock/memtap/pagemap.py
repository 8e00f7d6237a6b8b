# SPDX-License-Identifier: Apache-2.0
"""Which pages of a file have content and which are known to be zero."""

import dataclasses
import hashlib
import zlib

import numpy as np
import numpy.typing as npt

from nova_snowflock import exception


@dataclasses.dataclass(frozen=True, eq=False)
class PageMap:
    """One flag a page: True where the file has content, False where it is known to be zero.

    :param content: array of bool, one element a page, in file order
    """

    content: npt.NDArray[np.bool_]

    @property
    def pages(self) -> int:
        """How many pages the file has."""
        return len(self.content)

    def count(self) -> int:
        """How many pages have content."""
        return int(np.count_nonzero(self.content))

    def encode(self) -> bytes:
        """The map as bytes: zlib over one bit a page, the first page in the lowest bit."""
        return zlib.compress(np.packbits(self.content, bitorder="little").tobytes())

    @classmethod
    def decode(cls, data: bytes, pages: int) -> "PageMap":
        """The map that :meth:`encode` wrote for a file of ``pages`` pages.

        :raises InvalidPageMap: ``data`` is damaged or describes another number of pages
        """
        size = -(-pages // 8)
        inflater = zlib.decompressobj()
        try:
            # One byte of room more than is right: a longer map is seen without being inflated.
            bits = inflater.decompress(data, size + 1)
        except zlib.error as error:
            raise exception.InvalidPageMap(f"the page map is damaged: {error}") from error
        if len(bits) != size or not inflater.eof or inflater.unused_data:
            raise exception.InvalidPageMap(f"the page map does not describe {pages} pages")
        flags = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
        if flags[pages:].any():
            raise exception.InvalidPageMap(f"the page map goes on after its {pages} pages")
        return cls(flags[:pages].astype(np.bool_))

    @staticmethod
    def digest(encoded: bytes) -> str:
        """SHA-256 of an encoded map, in hexadecimal, as a descriptor names it."""
        return hashlib.sha256(encoded).hexdigest()
