#!/usr/bin/env bash
# Checks the system packages that pip cannot install: a software renderer for MuJoCo, a C++ compiler, Python's
# headers and venv. As root on Debian or Ubuntu it installs missing ones; otherwise it prints the command.
# Usage: system_packages.sh PYTHON
set -euo pipefail
python=$1

if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then
    echo "error: '$python' is not Python 3.10 to 3.12; name one: make PYTHON=/path/to/python3.11" >&2
    exit 1
fi

missing=()
has_library() { ldconfig -p 2>/dev/null | grep -qF "$1" || /sbin/ldconfig -p 2>/dev/null | grep -qF "$1"; }
has_library libEGL.so.1 || missing+=(libegl1)
has_library libEGL_mesa.so.0 || missing+=(libegl-mesa0)
has_library libGL.so.1 || missing+=(libgl1)
has_library libOpenGL.so.0 || missing+=(libopengl0)
compgen -G '/usr/lib/*/dri/swrast_dri.so' >/dev/null || compgen -G '/usr/lib/*/libgallium-*.so' >/dev/null ||
    missing+=(libgl1-mesa-dri)
command -v c++ >/dev/null || missing+=(g++)
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import ensurepip' 2>/dev/null || missing+=("python$version-venv")
header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
[ -e "$header" ] || missing+=("python$version-dev")

[ ${#missing[@]} -eq 0 ] && exit 0
install="apt-get update && apt-get install -y --no-install-recommends ${missing[*]}"
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    echo "installing system packages: ${missing[*]}"
    DEBIAN_FRONTEND=noninteractive bash -c "$install" >/dev/null
else
    echo "error: system packages missing: ${missing[*]}; install them: sudo sh -c '$install'" >&2
    exit 1
fi
