#!/usr/bin/env bash
# test.sh quick|all: single-process tests in parallel, then those that start several processes, one at a time.
# Both parts run even when the first fails; a part that finds no test fails too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
  quick) slow=" and not slow" ;;
  all) slow="" ;;
  *) echo "usage: bash .ci/test.sh quick|all" >&2; exit 2 ;;
esac

export OMP_NUM_THREADS=1
pytest=("${VENV:-.venv}/bin/python" -m pytest)
status=0
"${pytest[@]}" -n "${WORKERS:-2}" --dist loadgroup -m "not distributed$slow" || status=1
"${pytest[@]}" -m "distributed$slow" || status=1
exit "$status"
