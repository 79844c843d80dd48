#!/usr/bin/env bash
# Rebuilds locks/*.txt from pyproject.toml: exact versions and hashes for every supported Python and platform. Needs uv.
# Keeps versions that are still allowed; `tools/lock.sh --upgrade` takes the newest of all packages, and
# `tools/lock.sh --upgrade-package jax` the newest of one. Passes all options to `uv pip compile`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in -h | --help) sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" && exit ;; esac

uv=${UV:-uv}
command -v "$uv" >/dev/null || { echo "lock.sh: uv not found; pip install uv, or set UV to its path" >&2 && exit 2; }

# Use only the default index, without this machine's folders of wheels, other indexes and settings.
unset UV_FIND_LINKS UV_EXTRA_INDEX_URL UV_INDEX UV_CONSTRAINT UV_OVERRIDE UV_EXCLUDE_NEWER UV_PRERELEASE
unset UV_RESOLUTION UV_NO_CONFIG UV_CONFIG_FILE

lock() { # NAME OPTION...
    echo "locks/$1.txt"
    "$uv" pip compile --group build --universal --python-version 3.11 --generate-hashes \
        --no-emit-index-url --no-emit-find-links --no-header --quiet --output-file "locks/$1.txt" "${@:2}"
    if grep -n '://' "locks/$1.txt"; then
        echo "lock.sh: locks/$1.txt contains a URL" >&2
        exit 1
    fi
}

mkdir -p locks
lock test pyproject.toml --extra test "$@"
# The other locks take their versions from test.txt.
lock run pyproject.toml --constraint locks/test.txt "$@"
lock cuda12 pyproject.toml --extra cuda12 --constraint locks/test.txt "$@"
lock build --constraint locks/test.txt "$@"
