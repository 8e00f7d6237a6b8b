# SPDX-License-Identifier: Apache-2.0
"""Serve a WSGI application: ``python -m devstack.embedded.wsgi MODULE ADDRESS PORT``.

The module's `application` is the application, as OpenStack's services have it.
"""

import importlib
import signal
import sys

import waitress

THREADS = 8


def main() -> None:
    module, address, port = sys.argv[1:]
    # The applications read options from the command line, and find none.
    sys.argv[1:] = []
    application = importlib.import_module(module).application
    signal.signal(signal.SIGTERM, end)
    waitress.serve(
        application,
        host=address,
        port=int(port),
        threads=THREADS,
        max_request_body_size=64 << 30,  # images
    )


def end(number: int, frame: object) -> None:
    raise SystemExit


if __name__ == "__main__":
    main()
