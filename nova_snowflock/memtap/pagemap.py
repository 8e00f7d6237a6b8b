# SPDX-License-Identifier: Apache-2.0
"""Which pages of a file have content and which are known to be zero."""

import dataclasses
import zlib

from nova_snowflock import exception

_TO_DIGITS = bytes.maketrans(b"\0\1", b"01")
_FROM_DIGITS = bytes.maketrans(b"01", b"\0\1")


@dataclasses.dataclass(frozen=True)
class PageMap:
    """One byte a page, in file order: 1 where it has content, 0 where it is known to be zero."""

    content: bytes

    @property
    def pages(self) -> int:
        """How many pages the file has."""
        return len(self.content)

    def count(self) -> int:
        """How many pages have content."""
        return self.content.count(1)

    def __or__(self, other: "PageMap") -> "PageMap":
        """The pages that have content in either, of two maps of files of one size."""
        content = int.from_bytes(self.content) | int.from_bytes(other.content)
        return PageMap(content.to_bytes(self.pages))

    def covers(self, other: "PageMap") -> bool:
        """Whether every page that has content in ``other`` has content here."""
        return not int.from_bytes(other.content) & ~int.from_bytes(self.content)

    def encode(self) -> bytes:
        """The map as bytes: zlib over one bit a page, the first page in the lowest bit."""
        digits = self.content[::-1].translate(_TO_DIGITS)
        bits = int(digits or b"0", 2).to_bytes(-(-self.pages // 8), "little")
        return zlib.compress(bits)

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
        number = int.from_bytes(bits, "little")
        if number >> pages:
            raise exception.InvalidPageMap(f"the page map goes on after its {pages} pages")
        digits = format(number, f"0{pages}b").encode() if pages else b""
        return cls(digits[::-1].translate(_FROM_DIGITS))
