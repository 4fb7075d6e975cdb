#!/bin/sh
# What the tests need beyond Python: a SLURM for the launchers, a browser for TensorBoard and reports, with letters for
# Korean. Without root those tests skip themselves.
set -eu
missing=""
{ command -v slurmctld && command -v munged; } >/dev/null 2>&1 || missing="slurm-wlm munge"
command -v chromium >/dev/null 2>&1 || missing="$missing chromium fonts-nanum"
if [ -z "$missing" ]; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "test-deps: needs root and apt-get to install $missing; their tests will skip themselves" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# Each for itself: what a distribution lacks must not keep the rest out.
for package in $missing; do
    apt-get install -y -qq --no-install-recommends "$package" >/dev/null ||
        echo "test-deps: $package could not be installed; its tests will skip themselves" >&2
done
