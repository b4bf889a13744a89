#!/usr/bin/env bash
# From images to scores in one command: set up, then ci/demo.py. Starts clean every time; writes runs/demo/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash ci/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
exec .venv/bin/python -m ci.demo "$@"
