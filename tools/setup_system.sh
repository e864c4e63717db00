#!/bin/sh
# Install the Debian or Ubuntu packages named as arguments that are missing.
# As root they are installed; otherwise one line says which are wanted. fio and g++ are for measuring and simulating only.
set -eu

missing=""
for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' && continue
    # a Python or compiler that came some other way serves as well
    case "$package" in
        gcc) command -v cc >/dev/null && continue ;;
        g++) command -v g++ >/dev/null && continue ;;
        libc6-dev) [ -e /usr/include/stdlib.h ] && continue ;;
        python3-dev) python3 -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' && continue ;;
        python3-venv) python3 -c 'import ensurepip, venv' 2>/dev/null && continue ;;
        pkg-config) command -v pkg-config >/dev/null && continue ;;
        fuse3) command -v fusermount3 >/dev/null && continue ;;
        libfuse3-dev) pkg-config --exists fuse3 2>/dev/null && continue ;;
        fio) command -v fio >/dev/null && continue ;;
    esac
    missing="$missing $package"
done

[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing >/dev/null
    exit 0
fi
needed=""
for package in $missing; do
    case "$package" in
        fio) echo "note: fio is not installed; the cold benchmarks go without it (sudo apt-get install fio)" >&2 ;;
        g++) echo "note: g++ is not installed; the FPGA is not simulated without it (sudo apt-get install g++)" >&2 ;;
        *) needed="$needed $package" ;;
    esac
done
[ -z "$needed" ] && exit 0
echo "missing packages:$needed; run: sudo apt-get install$needed" >&2
exit 1
