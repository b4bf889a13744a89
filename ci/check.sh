#!/usr/bin/env bash
# What a person and the CI both run: set up, then lint, format, types and the default tests. --full adds slow and browser.
# Every step runs even when one before it failed; the exit code is 1 when any did.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

selection="not slow and not browser and not gpu"
case "${1:-}" in
  "") ;;
  --full) selection="not gpu" ;;
  *)
    printf 'usage: bash ci/check.sh [--full]\n' >&2
    exit 2
    ;;
esac

started=$SECONDS
names=()
verdicts=()
seconds=()

step() { # name, command...
  local name=$1 begun=$SECONDS verdict=passed
  shift
  printf '\n== %s\n' "$name"
  "$@" || verdict=FAILED
  names+=("$name") verdicts+=("$verdict") seconds+=($((SECONDS - begun)))
}

step setup bash ci/setup.sh
if [ "${verdicts[0]}" = passed ]; then
  export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
  step "ruff check" ruff check .
  step "ruff format" ruff format --check .
  step mypy mypy
  # A worker a core: tests that start ranks of their own wait for them most of the time.
  step "pytest ($selection)" pytest -m "$selection" -n "$(getconf _NPROCESSORS_ONLN)" --dist worksteal --durations=15
fi

printf '\n%-60s %8s  %s\n' step seconds result
for index in "${!names[@]}"; do
  printf '%-60s %8d  %s\n' "${names[$index]}" "${seconds[$index]}" "${verdicts[$index]}"
done
printf '%-60s %8d\n' total $((SECONDS - started))
case " ${verdicts[*]} " in *" FAILED "*) exit 1 ;; esac
