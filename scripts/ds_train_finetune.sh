#!/usr/bin/env bash
# The counterpart of the official ptuning/ds_train_finetune.sh: every weight, with DeepSpeed, on one machine or many.
# Variables, named as there; unset ones keep the recipe's value:
#   LR=1e-4             learning rate
#   NUM_GPUS=4          processes on this machine; default: its GPUs
#   MASTER_PORT=29500   default: a free port (29500 for several machines)
#   MODEL=chatglm2-6b   preset, hub id or folder; default: the embedded glm-tiny
#   DATA=adgen          a name in configs/data, or a file of rows; default: the shipped ads
#   OUTPUT_DIR=runs/full
#   DEEPSPEED=zero2     zero2, zero2_offload, zero3, zero3_offload, or the path of a deepspeed.json
# Several machines, either from one of them, over ssh:
#   HOSTFILE=hosts      lines `HOST slots=N`
# or by running this on each of them:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0    (under Slurm, `srun bash scripts/ds_train_finetune.sh` sets these)
# Further words are Hydra overrides of `glmtune train`:
#   MODEL=THUDM/chatglm2-6b DEEPSPEED=zero3 bash scripts/ds_train_finetune.sh trainer.max_steps=5000
# Without a GPU it says so, and trains glm-tiny in two processes, so that the same path can be tried anywhere.
set -euo pipefail

MODEL=${MODEL:-}
DATA=${DATA:-}
LR=${LR:-}
NUM_GPUS=${NUM_GPUS:-}
MASTER_PORT=${MASTER_PORT:-}
OUTPUT_DIR=${OUTPUT_DIR:-}
DEEPSPEED=${DEEPSPEED:-zero2}
HOSTFILE=${HOSTFILE:-}
NNODES=${NNODES:-${SLURM_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
MASTER_ADDR=${MASTER_ADDR:-}

if [ -z "$MASTER_ADDR" ] && [ -n "${SLURM_JOB_NODELIST:-}" ] && command -v scontrol >/dev/null; then
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=${hosts%%$'\n'*}  # no pipe into `head`: its end kills the writer, and with pipefail this script
fi
gpus=$(nvidia-smi --list-gpus 2>/dev/null || true)
if [ -z "$HOSTFILE" ] && [[ $gpus != *GPU* ]]; then
    NUM_GPUS=${NUM_GPUS:-2}
    echo "No GPU here: training ${MODEL:-glm-tiny} in $NUM_GPUS processes on the CPU." >&2
fi
exec glmtune train +recipe=full deepspeed="$DEEPSPEED" ${DATA:+data="$DATA"} ${MODEL:+model.source="$MODEL"} \
    ${OUTPUT_DIR:+output_dir="$OUTPUT_DIR"} ${LR:+trainer.learning_rate="$LR"} \
    ${NUM_GPUS:+launch.num_processes="$NUM_GPUS"} ${MASTER_PORT:+launch.master_port="$MASTER_PORT"} \
    ${HOSTFILE:+launch.hostfile="$HOSTFILE"} ${MASTER_ADDR:+launch.master_addr="$MASTER_ADDR"} \
    launch.num_nodes="$NNODES" launch.node_rank="$NODE_RANK" "$@"
