#!/usr/bin/env bash
# Iterative pruning as a chain of jobs: level N is queued to start once level N-1 is done. A job that was preempted and
# queued again is not done, so the chain waits for it.
#
#   bash configs/slurm/chain.sh 25 [sbatch options --] --config configs/cifar10/resnet18_lrr.yaml --levels.count=25
#
# Prints the number of every job. A job that fails leaves those behind it never to start; --kill-on-invalid-dep=yes
# removes them from the queue.
set -euo pipefail
levels="${1:?usage: chain.sh LEVELS [SBATCH_OPTION ... --] --config FILE ...}"
shift
options=()
if [[ " $* " == *" -- "* ]]; then
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
fi
here="$(dirname "${BASH_SOURCE[0]}")"
before=""
for ((level = 0; level < levels; level++)); do
  dependency=()
  if [ -n "$before" ]; then
    dependency=(--dependency="afterok:$before" --kill-on-invalid-dep=yes)
  fi
  before="$(sbatch --parsable "${options[@]}" "${dependency[@]}" "$here/job.sbatch" --levels.only="$level" "$@")"
  before="${before%%;*}"
  echo "level $level: job $before"
done
