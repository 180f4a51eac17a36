#!/usr/bin/env bash
# Train on this machine: one rank per GPU, or one process on the CPU.
#   ./launch/run.sh configs/GPT-tiny.yaml [key=value ...] [--fresh]
#   NPROC=4 ./launch/run.sh ...    picks the number of ranks
# Exit codes: 0 finished, 75 stopped with everything saved (SIGTERM, SIGINT, SIGUSR1, SIGUSR2, max_minutes);
# docs/resuming.md lists the others.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$launch/setup.sh"
bin=$launch/../.venv/bin

for argument in "$@"; do
  case $argument in -h | --help) exec "$bin/python" -m distgpt.train --help ;; esac
done
if [ $# = 0 ]; then
  echo "usage: $0 CONFIG [key=value ...] [--fresh]    (--help lists every key)" >&2
  exit 2
fi

# One process checks everything that needs no model, so that an error is reported once and not by every rank.
checked=$("$bin/python" -m distgpt.check --for-launcher "$@")
device=${checked%%$'\n'*} output_dir=${checked#*$'\n'}

gpus=0
case $device in
  auto | cuda)
    if [ -z "${NPROC:-}" ] && command -v nvidia-smi >/dev/null; then # count the GPUs that torch can use
      gpus=$("$bin/python" -c 'import torch; print(torch.cuda.device_count())')
    fi
    ;;
esac
ranks=${NPROC:-$((gpus > 1 ? gpus : 1))}
case $ranks in
  '' | *[!0-9]* | 0*) echo "distgpt: error: NPROC: got '$ranks', expected a whole number from 1; set it to the number of ranks" >&2 && exit 6 ;;
  1) exec "$bin/python" -m distgpt.train "$@" ;;
esac
cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
signals=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 # torchrun forwards these to the ranks
"$bin/torchrun" --standalone --nproc_per_node="$ranks" --signals-to-handle="$signals" -m distgpt.train "$@" &
torchrun_pid=$!
for signal in TERM USR1 USR2; do trap "kill -$signal $torchrun_pid" "$signal"; done
if [ -t 0 ]; then trap : INT; else trap 'kill -INT $torchrun_pid' INT; fi # a terminal sends Ctrl-C to every process
code=0
wait "$torchrun_pid" || code=$?
while kill -0 "$torchrun_pid" 2>/dev/null; do # a signal interrupts `wait` but does not end torchrun
  wait "$torchrun_pid" || code=$?
done
# torchrun exits with 1 for every exit code of a rank except 0; the ranks wrote theirs to status.json.
exec "$bin/python" -m distgpt.resilience.run_lock "$output_dir" "$torchrun_pid" "$code"
