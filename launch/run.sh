#!/usr/bin/env bash
# Train on this machine: one rank per GPU, or one process on the CPU.
#   ./launch/run.sh configs/GPT-tiny.yaml [key=value ...] [--fresh]
#   NPROC=4 ./launch/run.sh ...    picks the number of ranks
# Exit codes of mistakes found before the start: 2 config, 3 data, 4 checkpoint, 6 environment.
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

# One process finds every mistake that can be found without a model, before several ranks would repeat it.
device=$("$bin/python" -m distgpt.check --print-device "$@")

gpus=0
case $device in
  auto | cuda)
    if [ -z "${NPROC:-}" ] && command -v nvidia-smi >/dev/null; then # torch counts what it can use
      gpus=$("$bin/python" -c 'import torch; print(torch.cuda.device_count())')
    fi
    ;;
esac
ranks=${NPROC:-$((gpus > 1 ? gpus : 1))}
case $ranks in
  '' | *[!0-9]* | 0*) echo "distgpt: error: NPROC: got '$ranks', expected a whole number from 1; set it to the ranks wanted" >&2 && exit 6 ;;
  1) exec "$bin/python" -m distgpt.train "$@" ;;
esac
cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
exec "$bin/torchrun" --standalone --nproc_per_node="$ranks" -m distgpt.train "$@"
