#!/usr/bin/env bash
# Renews locks/*.txt from pyproject.toml: exact versions and hashes for every supported Python and platform.
# Needs uv. Versions that are still allowed stay as they are; `tools/lock.sh --upgrade` takes the newest,
# `tools/lock.sh --upgrade-package jax` the newest of one package. Other options go to `uv pip compile` too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in -h | --help) sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" && exit ;; esac

uv=${UV:-uv}
command -v "$uv" >/dev/null || { echo "lock.sh: uv not found; pip install uv, or set UV to its path" >&2 && exit 2; }

# Only the default index decides: no folder of wheels, other index or setting of this machine.
unset UV_FIND_LINKS UV_EXTRA_INDEX_URL UV_INDEX UV_CONSTRAINT UV_OVERRIDE UV_EXCLUDE_NEWER UV_PRERELEASE
unset UV_RESOLUTION UV_NO_CONFIG UV_CONFIG_FILE

lock() { # name, then the options that differ
    echo "locks/$1.txt"
    "$uv" pip compile --group build --universal --python-version 3.11 --generate-hashes \
        --no-emit-index-url --no-emit-find-links --no-header --quiet --output-file "locks/$1.txt" "${@:2}"
    if grep -n '://' "locks/$1.txt"; then
        echo "lock.sh: locks/$1.txt names an address" >&2
        exit 1
    fi
}

mkdir -p locks
lock test pyproject.toml --extra test "$@"
# The others take the versions that test.txt has.
lock run pyproject.toml --constraint locks/test.txt "$@"
lock cuda12 pyproject.toml --extra cuda12 --constraint locks/test.txt "$@"
lock build --constraint locks/test.txt "$@"
