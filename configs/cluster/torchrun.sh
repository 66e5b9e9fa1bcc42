#!/usr/bin/env bash
# torchrun on one or several machines: after the loss of a process the job restarts from its checkpoint
#
#   bash configs/cluster/torchrun.sh --config clip_vitb32 --data.dataset cifar10             all GPUs of this machine
#   NODES=2 NODE=0 MASTER=node0 bash configs/cluster/torchrun.sh --config ...                 on the first machine
#   NODES=2 NODE=1 MASTER=node0 bash configs/cluster/torchrun.sh --config ...                 on the second
#
# Cost: at best the time on one GPU divided by the number of GPUs (docs/many_devices.md). A restart loads the model again
# and repeats at most --checkpoint.every_n_steps (50) optimizer steps.
# All machines need the same checkout, data and working folder. Runs are written to runs/NAME/TIME in that folder.
set -euo pipefail

NODES=${NODES:-1}                 # number of machines
NODE=${NODE:-0}                   # index of this machine, 0 is MASTER
MASTER=${MASTER:-127.0.0.1}       # address of the first machine
PORT=${PORT:-29500}               # a free port of that machine
GPUS=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)} # processes per machine
RESTARTS=${RESTARTS:-3}           # most restarts
NAME=${NAME:-torchrun-$PORT}      # an unfinished run with this name is resumed; use a new name to start a new run

if [ "$GPUS" -lt 1 ]; then
  echo "no GPU found. Set the number of processes: GPUS=2 bash $0 ... --trainer.accelerator cpu" >&2
  exit 2
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"

exec torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "$GPUS" \
  --master-addr "$MASTER" --master-port "$PORT" --max-restarts "$RESTARTS" \
  -m randlora_pl fit "$@" --run.name "$NAME" --resume auto
