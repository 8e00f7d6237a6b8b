# SPDX-License-Identifier: Apache-2.0
"""What runs in dom0: evaluates functions, as the agent of an emulated host does.

``python -m tests.xen.agent SOCKET``
"""

import contextlib
import os
import socket
import sys
import threading

import libvirt

from tests.emulation import agent


def main() -> None:
    [path] = sys.argv[1:]
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    # libvirt's Python binding prints errors, besides raising them.
    libvirt.registerErrorHandler(lambda *_: None, None)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            caller, _ = listener.accept()
            threading.Thread(target=agent.answer, args=[caller], daemon=True).start()


if __name__ == "__main__":
    main()
