#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Installs what bindep.txt lists, if any of it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

mapfile -t packages < <(sed --quiet 's/^\([a-z0-9][a-z0-9.+-]*\).*/\1/p' bindep.txt)
missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
    [[ $status == installed ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
    exit
fi

if ((EUID != 0)); then
    echo "Install as root: apt-get install ${missing[*]}" >&2
    exit 1
fi

# Whatever daemons these bring are not to run by themselves, neither now nor after a reboot: emulated
# hosts and the embedded cloud start their own.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    trap 'rm --force "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet
apt-get install --quiet --yes --no-install-recommends "${missing[@]}"
if [[ " ${missing[*]} " == *" rabbitmq-server "* ]]; then
    update-rc.d rabbitmq-server disable
fi
