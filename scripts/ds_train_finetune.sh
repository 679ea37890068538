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
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
if [ -z "$HOSTFILE" ] && ! nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then
    NUM_GPUS=${NUM_GPUS:-2}
    echo "No GPU here: training ${MODEL:-glm-tiny} in $NUM_GPUS processes on the CPU." >&2
fi
case $DEEPSPEED in
    *.json) zero=(deepspeed=zero2 deepspeed.config_file="$DEEPSPEED") ;;
    *) zero=(deepspeed="$DEEPSPEED") ;;
esac
case $DATA in
    "") rows=() ;;
    */* | *.json | *.jsonl | *.csv | *.parquet) rows=(data=files data.train_file="$DATA") ;;
    *) rows=(data="$DATA") ;;
esac
exec glmtune train +recipe=full "${zero[@]}" "${rows[@]}" ${MODEL:+model.source="$MODEL"} \
    ${OUTPUT_DIR:+output_dir="$OUTPUT_DIR"} ${LR:+trainer.learning_rate="$LR"} \
    ${NUM_GPUS:+launch.num_processes="$NUM_GPUS"} ${MASTER_PORT:+launch.master_port="$MASTER_PORT"} \
    ${HOSTFILE:+launch.hostfile="$HOSTFILE"} ${MASTER_ADDR:+launch.master_addr="$MASTER_ADDR"} \
    launch.num_nodes="$NNODES" launch.node_rank="$NODE_RANK" "$@"
