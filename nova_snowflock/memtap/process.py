# SPDX-License-Identifier: Apache-2.0
"""Starting memory servers and memtaps, finding them again, and ending them. For root.

A process outlives whoever starts it. All that anyone needs to find it is its run directory, which
holds its control socket, its log and, for a memtap, its mount. The run directory belongs to one
image on one host; its name must lie in a directory that everyone may pass through.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from typing import TypeVar

from nova_snowflock import exception
from nova_snowflock.memtap import control
from nova_snowflock.memtap import lockfile
from nova_snowflock.memtap import spec as process_spec
from nova_snowflock.memtap.client import fuse

_START_TIMEOUT = 30.0
_STOP_TIMEOUT = 5.0
_LOOK_AGAIN = 0.005

Spec = process_spec.ServerSpec | process_spec.MemtapSpec
_Client = TypeVar("_Client", bound=control.ControlClient)


def start_memory_server(spec: process_spec.ServerSpec) -> control.MemoryServerClient:
    """Start the memory server of an image, or find the one that runs.

    :raises ControlError: it could not be set up; the message says why
    """
    with _locked(spec.run_directory, spec.role):
        running = find_memory_server(spec.run_directory)
        if running:
            return running
        try:
            _wait(_launch(spec), spec)
            path = process_spec.socket_path(spec.run_directory, spec.role)
            return control.MemoryServerClient(path)
        except BaseException:
            _stop(spec.run_directory, spec.role)
            raise


def start_memtap(spec: process_spec.MemtapSpec) -> control.MemtapClient:
    """Start the memtap of an image on this host, or find the one that runs.

    :raises ControlError: it could not be set up; the message says why
    """
    with _locked(spec.run_directory, spec.role):
        running = find_memtap(spec.run_directory)
        if running:
            return running
        with _launched_memtap(spec):
            pass
        return control.MemtapClient(process_spec.socket_path(spec.run_directory, spec.role))


@contextlib.contextmanager
def memtap_starting(spec: process_spec.MemtapSpec) -> Iterator[None]:
    """Start the memtap of an image on this host, if it does not run, and use it already meanwhile.

    Inside the context its files can be opened; whoever does waits until it is ready, as it is on
    leaving. If it could not be set up, opening fails.

    :raises ControlError: it could not be set up; the message says why
    """
    with contextlib.ExitStack() as stack:
        while find_memtap(spec.run_directory) is None:
            try:
                stack.enter_context(_locked(spec.run_directory, spec.role, wait=False))
            except BlockingIOError:
                if _is_mounted(process_spec.mount_path(spec.run_directory)):
                    break  # someone else is starting it just now
                time.sleep(_LOOK_AGAIN)
            else:
                stack.enter_context(_launched_memtap(spec))
                break
        yield


@contextlib.contextmanager
def _launched_memtap(spec: process_spec.MemtapSpec) -> Iterator[None]:
    try:
        launched = _mount_and_launch(spec)
    except BaseException as error:
        _stop_memtap(spec.run_directory)
        if isinstance(error, OSError):
            raise exception.ControlError(
                f"The memtap of image {spec.image} could not be started: {error}"
            ) from error
        raise
    try:
        yield
    finally:
        # What failed inside is no reason to stop it: others on this host may use it by now.
        try:
            _wait(launched, spec)
        except BaseException:
            _stop_memtap(spec.run_directory)
            raise


def _mount_and_launch(spec: process_spec.MemtapSpec) -> subprocess.Popen[bytes]:
    # To the mount, which lets in whom it is for.
    os.chmod(spec.run_directory, 0o711)
    mount = process_spec.mount_path(spec.run_directory)
    _unmount(mount)
    os.makedirs(mount, mode=0o700, exist_ok=True)
    os.makedirs(spec.store_directory, mode=0o700, exist_ok=True)
    # From here on the kernel keeps what it is asked until memtap takes it; if memtap ends, it
    # refuses that and whatever comes.
    connection = fuse.mount(mount)
    try:
        return _launch(spec, connection)
    finally:
        os.close(connection)


def find_memory_server(run_directory: str) -> control.MemoryServerClient | None:
    """The memory server of the run directory, if one answers there."""
    path = process_spec.socket_path(run_directory, process_spec.ServerSpec.role)
    return _answering(control.MemoryServerClient(path))


def find_memtap(run_directory: str) -> control.MemtapClient | None:
    """The memtap of the run directory, if one answers there."""
    path = process_spec.socket_path(run_directory, process_spec.MemtapSpec.role)
    return _answering(control.MemtapClient(path))


def stop_memory_server(run_directory: str) -> None:
    """End the memory server of the run directory, if there is one, and remove its files."""
    if os.path.isdir(run_directory):
        with _locked(run_directory, process_spec.ServerSpec.role):
            _stop(run_directory, process_spec.ServerSpec.role)


def stop_memtap(run_directory: str) -> None:
    """End the memtap of the run directory, if there is one; remove its mount and its files."""
    if os.path.isdir(run_directory):
        with _locked(run_directory, process_spec.MemtapSpec.role):
            _stop_memtap(run_directory)


def _stop_memtap(run_directory: str) -> None:
    _stop(run_directory, process_spec.MemtapSpec.role)
    mount = process_spec.mount_path(run_directory)
    _unmount(mount)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(mount)


def _launch(spec: Spec, *fds: int) -> subprocess.Popen[bytes]:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(process_spec.socket_path(spec.run_directory, spec.role))
    launched = subprocess.Popen(
        # -P: nobody's current directory is where a root process takes its modules from.
        (sys.executable, "-P", "-m", spec.module, *map(str, fds)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=fds,
    )
    assert launched.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended, and says why
        launched.stdin.write(process_spec.encode(spec))
        launched.stdin.close()
    launched.stdin = None
    return launched


def _wait(launched: subprocess.Popen[bytes], spec: Spec) -> None:
    try:
        out, errors = launched.communicate(timeout=_START_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        launched.kill()
        launched.communicate()
        raise exception.ControlError(
            f"the {spec.role} of image {spec.image} was not ready after {_START_TIMEOUT} s"
        ) from error
    if launched.returncode:
        said = (out + errors).decode(errors="replace").strip()
        raise exception.ControlError(
            f"the {spec.role} of image {spec.image} could not be started: {said}"
        )


def _answering(client: _Client) -> _Client | None:
    try:
        client.peer()
    except exception.ControlError:
        return None
    return client


def _stop(run_directory: str, role: str) -> None:
    socket = process_spec.socket_path(run_directory, role)
    client = _answering(control.ControlClient(socket))
    if client:
        _end(client)
    for path in (socket, process_spec.log_path(run_directory, role)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _end(client: control.ControlClient) -> None:
    try:
        process = os.pidfd_open(client.peer())
    except (exception.ControlError, ProcessLookupError):
        return  # it has just ended
    try:
        with contextlib.suppress(exception.ControlError):
            client.stop()
        ended = select.poll()
        ended.register(process, select.POLLIN)
        if not ended.poll(_STOP_TIMEOUT * 1000):
            signal.pidfd_send_signal(process, signal.SIGKILL)
            ended.poll(_STOP_TIMEOUT * 1000)
    finally:
        os.close(process)


def _unmount(mount: str) -> None:
    """Unmount whatever earlier memtaps have left there."""
    while True:
        try:
            fuse.unmount(mount)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):  # nothing is mounted there
                return
            raise


@contextlib.contextmanager
def _locked(run_directory: str, role: str, *, wait: bool = True) -> Iterator[None]:
    """Keep others on this host from starting or ending that process of the image meanwhile.

    :raises BlockingIOError: someone does just that, and this is not to wait
    """
    parent = os.path.dirname(run_directory)
    if not os.path.isdir(parent):
        os.makedirs(parent, exist_ok=True)
        os.chmod(parent, 0o711)
    operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    with lockfile.held(os.path.join(run_directory, f"{role}.lock"), operation):
        yield


def _is_mounted(mount: str) -> bool:
    """Whether something is mounted there; does not ask that, as stat(2) would."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        return any(line.split(" ", 5)[4] == mount for line in mounts)
