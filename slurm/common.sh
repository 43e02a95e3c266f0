# Shared by the job scripts, which source it with $code set: the site's settings, the job's step, and how a job ends.
# The settings are those of the checkout that the job was submitted from: they may hold keys, so no copy has them.

CONTAINER=() SRUN_OPTIONS=()
if [ -f slurm/site.env ]; then . slurm/site.env; fi
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=$PWD/.venv/bin/python; else PYTHON=$(command -v python3 || command -v python); fi
fi
export SLURM_EXPORT_ENV=ALL # the job's environment reaches its step, however the job was submitted
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK # every task sees all of the job's GPUs on its node, as NCCL needs

report() { echo "=== job $SLURM_JOB_ID: $* [$(date '+%F %T')]"; } # slurm.status reads these lines

start_number() { echo $((${SLURM_RESTART_COUNT:-0} + 1)); }

use_code() { # use_code FOLDER: run the code in FOLDER, now and after a requeue; relative paths stay those of the submission
  code=$1
  mkdir -p runs/.slurm && ln -sfn "$code" "runs/.slurm/$SLURM_JOB_ID"
  # Through the link, since the name of a run may contain a colon.
  export PYTHONPATH=$PWD/runs/.slurm/$SLURM_JOB_ID${PYTHONPATH:+:$PYTHONPATH}
}

rendezvous() { # set MASTER_ADDR to the address of the first node, whose name may not resolve, and MASTER_PORT
  local first_node
  first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_ADDR=$(scontrol show node -o "$first_node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  MASTER_PORT=$((10000 + (SLURM_JOB_ID + 7919 * ${SLURM_RESTART_COUNT:-0}) % 20000)) # another one for each start
  export MASTER_ADDR MASTER_PORT
}

warned=${warned:-} step=

# A task ignores the signal until its Python has a handler, so it is repeated for as long as the step runs.
warn_step() { while kill -USR1 "$step" 2>/dev/null; do sleep 1; done; }

on_warning() {
  if [ -n "$warned" ]; then return; fi
  warned=yes
  report "warned by SIGUSR1"
  if [ -n "$step" ]; then warn_step & fi
}
trap on_warning USR1

run_step() { # run_step [SRUN OPTIONS] COMMAND...: run COMMAND as the job's step and return its exit code
  local status
  # When a task ends early, the others get 120 seconds to finish what they write.
  (trap '' USR1 && exec srun --kill-on-bad-exit=0 --wait=120 "${SRUN_OPTIONS[@]}" "$@") &
  step=$!
  if [ -n "$warned" ]; then warn_step & fi
  while true; do
    status=0
    wait "$step" || status=$?
    # A signal to this script interrupts `wait`, with a code above 128, while the step is still running.
    if [ "$status" -le 128 ] || ! kill -0 "$step" 2>/dev/null; then return "$status"; fi
  done
}

nodes_answer() {
  if [ "$SLURM_NNODES" -eq 1 ]; then return 0; fi
  timeout 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task=1 \
    true 2>/dev/null
}

finish() { # finish EXIT_CODE: end the job, or requeue it if its next start can resume
  local reason=
  if [ "$1" -eq 0 ]; then
    report "done"
    exit 0
  elif [ "$1" -eq 75 ]; then
    reason="saved"
  elif [ -n "$warned" ]; then
    reason="ended with exit code $1 after the warning"
  elif [ "$1" -ne 2 ] && ! nodes_answer; then
    reason="ended with exit code $1 and a node does not answer"
  fi
  if [ -n "$reason" ]; then
    report "$reason, requeueing"
    if scontrol requeue "$SLURM_JOB_ID"; then exit 0; fi
    report "this cluster does not requeue the job; submit it again to resume"
  fi
  report "failed with exit code $1"
  exit "$1"
}
