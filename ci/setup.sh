#!/usr/bin/env bash
# Make .venv at the repository root from the pinned lock. Does nothing when it is up to date.
# PYTHON names another interpreter than the first of python3, python3.13, python3.12, python3.11 that is new enough.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
umask 022

say() { printf '[setup] %s\n' "$*"; }
fail() {
  printf '[setup] error: %s\n' "$*" >&2
  exit 2
}

lock=ci/requirements.lock
stamp=.venv/.roentgen-stamp

# What the environment is made from. The place is part of it: a virtual environment cannot be moved.
wanted() { { cat "$lock" pyproject.toml ci/setup.sh && pwd; } | .venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read() + sys.version.encode()).hexdigest())'; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# One setup at a time: two at once would write the same folder. The lock is on the root folder itself.
if command -v flock >/dev/null; then
  exec 9<.
  flock -n 9 || { say "another setup is at work here; waiting for it" && flock 9; }
fi

if [ -x .venv/bin/python ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted)" ]; then
  say "up to date"
  exit 0
fi

started=$SECONDS
if ! { [ -x .venv/bin/python ] && new_enough .venv/bin/python; }; then
  python=""
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if new_enough "$candidate"; then
      python=$candidate
      break
    fi
  done
  [ -n "$python" ] || fail "none of ${PYTHON:-python3 python3.13 python3.12 python3.11} is Python 3.11 or newer; install one and name it: PYTHON=/path/to/python3.11 bash ci/setup.sh"
  say "virtual environment from $("$python" -V)"
  rm -rf .venv
  "$python" -m venv .venv || fail "$python has no venv module; on Debian or Ubuntu: apt-get install python3-venv"
fi
rm -f "$stamp"

say "installing $(grep -c '==' "$lock") pinned packages (about 4 GB on disk, one to two minutes)"
install() { # what it is, pip arguments...
  local what=$1
  shift
  .venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off --no-compile "$@" >.venv/pip.log 2>&1 || {
    grep -v -e '^WARNING: Location' -e '^Requirement already' .venv/pip.log | tail -n 20 >&2
    fail "pip could not install $what; the end of its log stands above, all of it is in .venv/pip.log (packages come from the index of your pip configuration)"
  }
}
install "$lock" -r "$lock"
install "this repository" --no-deps --no-build-isolation -e .
wanted >"$stamp"
say "done in $((SECONDS - started)) s"
