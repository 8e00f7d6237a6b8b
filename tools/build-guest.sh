#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Builds the test guest in build/guest. Its kernel package is kept in $SNOWFLOCK_CACHE.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=${SNOWFLOCK_CACHE:-$HOME/.cache/nova-snowflock}

# The meta package depends on the kernel itself, which has the version in its name. Nothing if apt
# knows no packages yet.
kernel() {
    apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed --quiet 's/.*Depends: //p' || true
}

cached() {
    find "$cache" -maxdepth 1 -name "$(kernel)_*.deb" | sort --version-sort | tail --lines=1
}

mkdir --parents "$cache"
package=$(cached)
if [[ -z $package ]]; then
    # A directory of its own: half a download is never taken for a package.
    download=$(mktemp --directory "$cache/download.XXXXXX")
    trap 'rm --recursive --force "$download"' EXIT
    apt-get --quiet update
    (cd "$download" && apt-get --quiet --option APT::Sandbox::User=root download "$(kernel)")
    mv "$download"/*.deb "$cache"
    package=$(cached)
fi
/usr/bin/python3 tests/guest/build.py "$package" build/guest
