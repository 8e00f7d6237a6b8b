#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Builds the test guest in build/guest. The kernel package it takes is kept in $SNOWFLOCK_CACHE.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
cache=${SNOWFLOCK_CACHE:-$HOME/.cache/nova-snowflock}

# The meta package depends on the image itself, whose name holds the version.
image() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed --quiet 's/.*Depends: \(linux-image-[0-9].*\)/\1/p'; }
name=$(image)
if [[ -z $name ]]; then
    apt-get update --quiet
    name=$(image)
fi

mkdir --parents "$cache"
shopt -s nullglob
packages=("$cache/$name"_*.deb)
if ((${#packages[@]} == 0)); then
    # A directory of its own: a download that was cut short is never taken for a package.
    download=$(mktemp --directory "$cache/download.XXXXXX")
    trap 'rm --recursive --force "$download"' EXIT
    (cd "$download" && apt-get --quiet --option APT::Sandbox::User=root download "$name")
    mv "$download"/*.deb "$cache"
    packages=("$cache/$name"_*.deb)
fi
/usr/bin/python3 "$root/tests/guest/build.py" "${packages[-1]}" "$root/build/guest"
