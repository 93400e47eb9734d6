# What the batch scripts beside this file share; they source it. The arguments of every function are the harness's own:
# --config FILE ... --section.key=value ...
#
#   SIEVE_ENV      virtual environment to run in (default .venv)
#   SIEVE_RANKS    processes per node (default: one per GPU given to the node, or one)
#   SIEVE_TORCHRUN more options of torchrun, e.g. --max-restarts=3
# shellcheck shell=bash

ranks="${SIEVE_RANKS:-${SLURM_GPUS_ON_NODE:-1}}"
read -ra torchrun_options <<<"${SIEVE_TORCHRUN:-}"

activate() {
  # shellcheck disable=SC1091
  source "${SIEVE_ENV:-.venv}/bin/activate"
  export PYTHONUNBUFFERED=1
  handle_usr1
}

# one_node ARGS...: torchrun on this node. --standalone takes a free port, so tasks that share a node never clash.
one_node() {
  stoppable torchrun --standalone --nproc-per-node="$ranks" "${torchrun_options[@]}" harness.py "$@"
}

# all_nodes ARGS...: one torchrun on each node of the job, which meet at a port of the first one. The port follows from
# the job's number, below those that systems hand out, so two jobs that share the first node do not meet at one.
all_nodes() {
  local first address
  first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
  address="$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname --ip-address | awk '{ print $1 }')"
  stoppable srun --ntasks-per-node=1 --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="$ranks" --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d \
    --rdzv-endpoint="$address:$((20000 + SLURM_JOB_ID % 10000))" "${torchrun_options[@]}" harness.py "$@"
}

# handle_usr1: let torchrun hand on a USR1 sent to the whole step, where it can. An older torchrun dies of it and leaves
# its workers, so the scripts ask SLURM to send it to the batch shell alone (--signal=B:USR1@120).
handle_usr1() {
  local run
  run="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch/distributed/run.py"
  if grep -qs -- --signals-to-handle "$run"; then
    torchrun_options+=("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
  fi
}

# stoppable COMMAND...: run COMMAND and hand USR1 and TERM on to it as TERM, at which the harness stores its state and
# ends. Returns COMMAND's exit code.
stoppable() {
  local child code=0
  "$@" &
  child=$!
  if [ "$1" = srun ]; then
    # To all processes of the job's steps, on all nodes; srun itself would take it for a wish to kill them.
    trap 'scancel --signal=TERM "$SLURM_JOB_ID"' USR1 TERM
  else
    trap 'kill -TERM "$child" 2>/dev/null' USR1 TERM
  fi
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # a trap ends a wait before the child has ended
    code=0
    wait "$child" || code=$?
  done
  trap - USR1 TERM
  return "$code"
}

# state ARGS...: what status.json of this command says. torchrun makes 1 of every worker's exit code.
state() {
  sed -n 's/^ *"state": "\([a-z]*\)".*/\1/p' "$(python harness.py "$@" --run.where=true)" 2>/dev/null || true
}

# requeued one_node|all_nodes ARGS...: run, and put the job back into the queue if it was stopped before it was done.
requeued() {
  local how="$1" code=0
  shift
  "$how" "$@" || code=$?
  if [ "$code" -ne 0 ] && [ "$(state "$@")" = preempted ]; then
    echo "sieve: job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    return 0
  fi
  return "$code"
}
