#!/usr/bin/env bash
# Make .venv/peers, where the loaders of others live: the packages of .venv (same torch, Pillow, DALI), plus theirs.
# A folder of its own, since their pins contradict ours. Does nothing when it is up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

bash ci/setup.sh
list=ci/bench/requirements-peers.txt
stamp=.venv/peers/.stamp
wanted="$(sha256sum "$list" | cut -d' ' -f1)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  echo "[peers] up to date"
  exit 0
fi
rm -rf .venv/peers
.venv/bin/python -m venv .venv/peers
site="$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
echo "$site" >"$(.venv/peers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
.venv/peers/bin/python -m pip install --quiet --no-deps --requirement "$list"
echo "$wanted" >"$stamp"
echo "[peers] installed into .venv/peers"
