#!/usr/bin/env bash
# Kernel tests and benchmarks on a machine with a GPU, torch 2.11 or newer and triton, and nothing else of ours: no set-up,
# no pytest. PYTHON names another interpreter than python3. Ends within 8 minutes; the exit code is 1 when a step failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
limit_s=470 # and 5 s to kill a step that does not end

fail() {
  printf 'ci/gpu.sh: error: %s\n' "$*" >&2
  exit 2
}

[ $# -eq 0 ] || fail "it takes no arguments; PYTHON=/path/to/python bash ci/gpu.sh"
command -v "$python" >/dev/null || fail "$python is not there; name another with PYTHON="
# Each of these prints one line and nothing else, so that it is the message.
problem=$("$python" - 2>/dev/null <<'PY'
import re
try:
    import torch
except ImportError:
    raise SystemExit(print("torch is not installed"))
if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 11):
    raise SystemExit(print(f"torch {torch.__version__} is too old; 2.11 or newer is needed"))
if not torch.cuda.is_available():
    raise SystemExit(print(f"no GPU: torch {torch.__version__} sees no CUDA device"))
try:
    import triton
except ImportError:
    raise SystemExit(print("triton is not installed; a CUDA build of torch brings it"))
PY
) || fail "$python does not run"
[ -z "$problem" ] || fail "$problem"
"$python" -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)'

failed=0
step() { # name, command...
  local name=$1 begun=$SECONDS verdict=passed left=$((limit_s - SECONDS))
  shift
  printf '\n== %s\n' "$name"
  [ "$left" -gt 0 ] && timeout --kill-after=5 "$left" "$@" || verdict=FAILED
  [ "$verdict" = passed ] || failed=1
  printf '== %s: %s after %d s\n' "$name" "$verdict" $((SECONDS - begun))
}

step "kernel tests" "$python" -m ci.plain_tests tests/kernels/test_gpu.py
step "benchmarks: figures beside limits" "$python" -m ci.bench.gaussian_gpu
printf '\ntotal %d s of %d s\n' "$SECONDS" "$limit_s"
exit "$failed"
