#!/usr/bin/env bash
# One machine or several with torchrun: a lost process ends the job, which starts again and goes on from its checkpoint
#
#   bash configs/cluster/torchrun.sh --config clip_vitb32 --data.dataset cifar10             all GPUs of this machine
#   NODES=2 NODE=0 MASTER=node0 bash configs/cluster/torchrun.sh --config ...                 on the first machine
#   NODES=2 NODE=1 MASTER=node0 bash configs/cluster/torchrun.sh --config ...                 on the second
#
# Cost: what the config costs, divided by at most the number of GPUs (docs/many_devices.md). A restart repeats at most
# --checkpoint.every_n_steps optimizer steps (50), and loads the model again.
# All machines need the same checkout, data and folder of runs; runs lie in runs/NAME/TIME of that folder.
set -euo pipefail

NODES=${NODES:-1}                 # machines
NODE=${NODE:-0}                   # which of them this is; 0 is MASTER
MASTER=${MASTER:-127.0.0.1}       # address of the first machine
PORT=${PORT:-29500}               # a free port of it
GPUS=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)} # processes of each machine
RESTARTS=${RESTARTS:-3}           # how often the job may start again
NAME=${NAME:-torchrun-$PORT}      # a run of this name that is unfinished is gone on with: take a new one for a new run

if [ "$GPUS" -lt 1 ]; then
  echo "no GPU found; say how many processes to start: GPUS=2 bash $0 ... --trainer.accelerator cpu" >&2
  exit 2
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"

exec torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "$GPUS" \
  --master-addr "$MASTER" --master-port "$PORT" --max-restarts "$RESTARTS" \
  -m randlora_pl fit "$@" --run.name "$NAME" --resume auto
