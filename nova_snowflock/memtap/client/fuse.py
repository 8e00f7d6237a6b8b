# SPDX-License-Identifier: Apache-2.0
"""The kernel's FUSE protocol, as far as a few read-only files in one directory need it.

Structures, operations and flags are those of Linux <linux/fuse.h>, protocol 7.31, in the byte order
of the host. Reads are answered whenever their pages are there; everything else at once.
"""

from collections.abc import Callable, Iterable
import ctypes
import dataclasses
import errno
import os
import stat
import struct
from typing import NamedTuple

from nova_snowflock.memtap import PAGE_SIZE

ROOT = 1
_FIRST_INODE = 2
_FOREVER = 1 << 31  # seconds that the kernel may keep names and attributes: they never change

_LOOKUP = 1
_FORGET = 2
_GETATTR = 3
_OPEN = 14
_READ = 15
_STATFS = 17
_RELEASE = 18
_INIT = 26
_OPENDIR = 27
_READDIR = 28
_RELEASEDIR = 29
_INTERRUPT = 36
_BATCH_FORGET = 42
_FALLOCATE = 43
_SETATTR = 4
_SYMLINK = 6
_MKNOD = 8
_MKDIR = 9
_UNLINK = 10
_RMDIR = 11
_RENAME = 12
_LINK = 13
_WRITE = 16
_SETXATTR = 21
_REMOVEXATTR = 24
_CREATE = 35
_RENAME2 = 45
_LSEEK = 46
_COPY_FILE_RANGE = 47
_TMPFILE = 51
# What a guest writes to its private mapping never gets here.
_CHANGES = frozenset(
    (
        _SETATTR,
        _SYMLINK,
        _MKNOD,
        _MKDIR,
        _UNLINK,
        _RMDIR,
        _RENAME,
        _LINK,
        _WRITE,
        _SETXATTR,
        _REMOVEXATTR,
        _CREATE,
        _RENAME2,
        _COPY_FILE_RANGE,
        _TMPFILE,
    )
)

_ASYNC_READ = 1 << 0
_MAX_PAGES = 1 << 22
_KEEP_CACHE = 1 << 1
_NO_FLUSH = 1 << 5

_IN_HEADER = struct.Struct("=IIQQIIII")
_OUT_HEADER = struct.Struct("=IiQ")
_INIT_IN = struct.Struct("=IIII")
_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
_OPEN_IN = struct.Struct("=II")
_INTERRUPT_IN = struct.Struct("=Q")
_READ_IN = struct.Struct("=QQI")
_LSEEK_IN = struct.Struct("=QQI")
_LSEEK_OUT = struct.Struct("=Q")
_OPEN_OUT = struct.Struct("=QII")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_ATTR_OUT = struct.Struct("=QII")
_ENTRY_OUT = struct.Struct("=QQQQII")
_STATFS_OUT = struct.Struct("=QQQQQIIII24x")
_DIRENT = struct.Struct("=QQII")

_MAJOR, _MINOR = 7, 31
_MAX_WRITE = 4096
_REQUEST_SIZE = 16384
_MAX_BACKGROUND = 1024  # reads that guests wait for at once
MAX_READ = 1 << 20
"""Bytes that the kernel reads at most in one request (FUSE_MAX_MAX_PAGES)."""

_libc = ctypes.CDLL(None, use_errno=True)
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MNT_DETACH = 2


@dataclasses.dataclass(frozen=True)
class File:
    """A file in the mounted directory.

    :param number: what reads are told about it
    :param size: bytes
    :param mode: permissions
    """

    number: int
    name: str
    size: int
    mode: int


class Read(NamedTuple):
    """A read of the kernel.

    :param unique: what an answer refers to
    :param thread: the thread that reads
    :param file: the file's number
    :param offset: bytes
    :param size: bytes
    :param writable: the file was opened for writing, as QEMU opens its memory
    """

    unique: int
    thread: int
    file: int
    offset: int
    size: int
    writable: bool


def mount(directory: str) -> int:
    """Mount on ``directory`` and return the connection's descriptor. Needs CAP_SYS_ADMIN.

    :raises OSError: there is no /dev/fuse, or the mount is refused
    """
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    target = os.fsencode(directory)
    if _libc.mount(b"snowflock", target, b"fuse.snowflock", flags, options.encode()):
        error = ctypes.get_errno()
        os.close(fd)
        raise OSError(error, os.strerror(error), directory)
    return fd


def unmount(directory: str) -> None:
    """Unmount, also while files are open. Needs CAP_SYS_ADMIN.

    :raises OSError: nothing is mounted there
    """
    if _libc.umount2(os.fsencode(directory), _MNT_DETACH):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), directory)


class Connection:
    """Answers the kernel.

    :param fd: from :func:`mount`; owned by this object
    :param owner: user and group ID that the files belong to
    :param read_around: bytes the kernel reads around a fault
    :param read: called with each read, which is answered by :meth:`answer` or :meth:`refuse`
    :param interrupted: called with the unique number of a read whose thread got a signal
    :param seek: called with a file's number, an offset, and whether to look for a hole and not for
        data; the offset at which it or the file's end is, or None if nothing more is there
    """

    def __init__(
        self,
        fd: int,
        files: Iterable[File],
        owner: tuple[int, int],
        read_around: int,
        read: Callable[[Read], None],
        interrupted: Callable[[int], None],
        seek: Callable[[int, int, bool], int | None],
    ) -> None:
        self.fd = fd
        self.unmounted = False
        self._owner = owner
        self._read_around = read_around
        self._read = read
        self._interrupted = interrupted
        self._seek = seek
        self._files = {_FIRST_INODE + file.number: file for file in files}
        self._inodes = {file.name.encode(): inode for inode, file in self._files.items()}
        self._request = memoryview(bytearray(_REQUEST_SIZE))
        self._header = bytearray(_OUT_HEADER.size)
        self._handlers: dict[int, Callable[[int, int, memoryview], None]] = {
            _LOOKUP: self._lookup,
            _GETATTR: self._getattr,
            _OPEN: self._open,
            _STATFS: self._statfs,
            _INIT: self._init,
            _OPENDIR: self._open_directory,
            _READDIR: self._readdir,
            _LSEEK: self._lseek,
            _RELEASE: self._done,
            _RELEASEDIR: self._done,
        }

    def receive(self) -> None:
        """Take every request that is there."""
        while True:
            try:
                size = os.readv(self.fd, (self._request,))
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOENT:  # the asker was killed while it was queued
                    continue
                if error.errno == errno.ENODEV:
                    self.unmounted = True
                    return
                raise
            header = _IN_HEADER.unpack_from(self._request)
            _, operation, unique, inode, _, _, thread, _ = header
            body = self._request[_IN_HEADER.size : size]
            if operation == _READ:
                writable, offset, size = _READ_IN.unpack_from(body)
                number = inode - _FIRST_INODE
                self._read(Read(unique, thread, number, offset, size, bool(writable)))
            elif operation == _INTERRUPT:
                self._interrupted(_INTERRUPT_IN.unpack_from(body)[0])
            elif operation not in (_FORGET, _BATCH_FORGET):
                self._dispatch(operation, unique, inode, body)

    def _dispatch(self, operation: int, unique: int, inode: int, body: memoryview) -> None:
        handler = self._handlers.get(operation)
        if handler is not None:
            handler(unique, inode, body)
        elif operation in _CHANGES:
            self.refuse(unique, errno.EROFS)
        elif operation == _FALLOCATE:
            # QEMU punches holes for pages that its guest gives back. Had it worked, the page would
            # read as the image's again; the guest, which may count on zeros, keeps its own instead.
            self.refuse(unique, errno.EOPNOTSUPP)
        else:
            self.refuse(unique, errno.ENOSYS)

    def answer(self, unique: int, *data: memoryview | bytes) -> None:
        """Answer a request with ``data``, of which every part follows the one before."""
        size = sum(map(len, data))
        _OUT_HEADER.pack_into(self._header, 0, _OUT_HEADER.size + size, 0, unique)
        self._send((self._header, *data))

    def refuse(self, unique: int, error: int) -> None:
        """Answer a request with an error number."""
        _OUT_HEADER.pack_into(self._header, 0, _OUT_HEADER.size, -error, unique)
        self._send((self._header,))

    def _send(self, parts: tuple[bytearray | memoryview | bytes, ...]) -> None:
        try:
            os.writev(self.fd, parts)
        except OSError as error:
            if error.errno == errno.ENODEV:
                self.unmounted = True
            elif error.errno != errno.ENOENT:  # else the asker was killed meanwhile
                raise

    def close(self) -> None:
        os.close(self.fd)

    def _init(self, unique: int, inode: int, body: memoryview) -> None:
        major, minor, read_ahead, flags = _INIT_IN.unpack_from(body)
        if (major, minor) < (_MAJOR, _MINOR):
            self.refuse(unique, errno.EPROTO)
            return
        self.answer(
            unique,
            _INIT_OUT.pack(
                _MAJOR,
                _MINOR,
                min(read_ahead, self._read_around),
                flags & (_ASYNC_READ | _MAX_PAGES),
                _MAX_BACKGROUND,
                _MAX_BACKGROUND,
                _MAX_WRITE,
                1,
                MAX_READ // PAGE_SIZE,
                0,
                0,
            ),
        )

    def _lookup(self, unique: int, inode: int, body: memoryview) -> None:
        found = self._inodes.get(bytes(body).rstrip(b"\0")) if inode == ROOT else None
        if found is None:
            self.refuse(unique, errno.ENOENT)
            return
        entry = _ENTRY_OUT.pack(found, 0, _FOREVER, _FOREVER, 0, 0)
        self.answer(unique, entry + self._attributes(found))

    def _getattr(self, unique: int, inode: int, body: memoryview) -> None:
        self.answer(unique, _ATTR_OUT.pack(_FOREVER, 0, 0) + self._attributes(inode))

    def _attributes(self, inode: int) -> bytes:
        if inode == ROOT:
            size, mode, links = 0, stat.S_IFDIR | 0o550, 2
        else:
            file = self._files[inode]
            size, mode, links = file.size, stat.S_IFREG | file.mode, 1
        uid, gid = self._owner
        blocks = -(-size // 512)
        return _ATTR.pack(
            inode, size, blocks, 0, 0, 0, 0, 0, 0, mode, links, uid, gid, 0, PAGE_SIZE, 0
        )

    def _open(self, unique: int, inode: int, body: memoryview) -> None:
        writable = _OPEN_IN.unpack_from(body)[0] & os.O_ACCMODE != os.O_RDONLY
        self.answer(unique, _OPEN_OUT.pack(writable, _KEEP_CACHE | _NO_FLUSH, 0))

    def _open_directory(self, unique: int, inode: int, body: memoryview) -> None:
        self.answer(unique, _OPEN_OUT.pack(0, 0, 0))

    def _done(self, unique: int, inode: int, body: memoryview) -> None:
        self.answer(unique)

    def _lseek(self, unique: int, inode: int, body: memoryview) -> None:
        # Only for SEEK_DATA and SEEK_HOLE; the kernel does the others on its own.
        _, offset, whence = _LSEEK_IN.unpack_from(body)
        found = self._seek(inode - _FIRST_INODE, offset, whence == os.SEEK_HOLE)
        if found is None:
            self.refuse(unique, errno.ENXIO)
        else:
            self.answer(unique, _LSEEK_OUT.pack(found))

    def _statfs(self, unique: int, inode: int, body: memoryview) -> None:
        blocks = sum(-(-file.size // PAGE_SIZE) for file in self._files.values())
        files = len(self._files)
        self.answer(unique, _STATFS_OUT.pack(blocks, 0, 0, files, 0, PAGE_SIZE, 255, PAGE_SIZE, 0))

    def _readdir(self, unique: int, inode: int, body: memoryview) -> None:
        _, offset, room = _READ_IN.unpack_from(body)
        entries = [(ROOT, b".", stat.S_IFDIR), (ROOT, b"..", stat.S_IFDIR)]
        entries += [(number, name, stat.S_IFREG) for name, number in self._inodes.items()]
        data = b""
        for position, (number, name, kind) in enumerate(entries[offset:], offset + 1):
            entry = _DIRENT.pack(number, position, len(name), kind >> 12) + name
            entry += bytes(-len(entry) % 8)
            if len(data) + len(entry) > room:
                break
            data += entry
        self.answer(unique, data)
