# Shared by the job scripts, which source it with $code set: the site's settings, the job's step, and how a job ends.

CONTAINER=() SRUN_OPTIONS=()
if [ -f "$code/slurm/site.env" ]; then . "$code/slurm/site.env"; fi
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=$PWD/.venv/bin/python; else PYTHON=$(command -v python3 || command -v python); fi
fi
export SLURM_EXPORT_ENV=ALL # what reached the job reaches its step, however the job was submitted
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK # every task sees all of the job's GPUs on its node, as NCCL wants it

use_code() { # use_code FOLDER: run what is in FOLDER, now and when the job starts again; relative paths stay the submission's
  code=$1
  mkdir -p runs/.slurm && ln -sfn "$code" "runs/.slurm/$SLURM_JOB_ID"
  export PYTHONPATH=$PWD/runs/.slurm/$SLURM_JOB_ID${PYTHONPATH:+:$PYTHONPATH} # a run's name may hold a colon, this does not
}

say() { echo "=== job $SLURM_JOB_ID: $* [$(date '+%F %T')]"; }

rendezvous() { # MASTER_ADDR, MASTER_PORT: the first node's address (its name may not resolve) and a port of the job's own
  local head
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_ADDR=$(scontrol show node -o "$head" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  MASTER_PORT=$((10000 + (SLURM_JOB_ID + 7919 * ${SLURM_RESTART_COUNT:-0}) % 20000))
  export MASTER_ADDR MASTER_PORT
}

warned=${warned:-} step=
# Until its Python has a handler a task ignores the signal, so it is repeated for as long as the step is there.
warn() { while kill -USR1 "$step" 2>/dev/null; do sleep 1; done; }
trap 'if [ -z "$warned" ]; then warned=yes; say "warned by SIGUSR1"; if [ -n "$step" ]; then warn & fi; fi' USR1

run_step() { # run_step [SRUN OPTIONS] COMMAND...: run it as the job's step; returns its exit code
  local status=0
  # A task that ends early leaves the others time to finish what they write.
  (trap '' USR1 && exec srun --kill-on-bad-exit=0 --wait=120 "${SRUN_OPTIONS[@]}" "$@") &
  step=$!
  if [ -n "$warned" ]; then warn & fi
  while wait "$step" || status=$?; [ "$status" -gt 128 ] && kill -0 "$step" 2>/dev/null; do status=0; done
  return "$status"
}

nodes_answer() {
  [ "$SLURM_NNODES" -eq 1 ] || timeout 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" \
    --ntasks-per-node=1 --cpus-per-task=1 true 2>/dev/null
}

finish() { # finish EXIT_CODE: end the job, or put it back into the queue where another start goes on
  if [ "$1" -eq 0 ]; then say "done"; exit 0; fi
  local why=
  if [ "$1" -eq 75 ]; then why="saved"; elif [ -n "$warned" ]; then why="ended with code $1 after the signal"
  elif [ "$1" -ne 2 ] && ! nodes_answer; then why="ended with code $1, a node does not answer"; fi
  if [ -n "$why" ]; then
    say "$why, back into the queue"
    if scontrol requeue "$SLURM_JOB_ID"; then exit 0; fi
    say "this cluster does not requeue it: submit it again to go on"
  fi
  say "failed with exit code $1"
  exit "$1"
}
