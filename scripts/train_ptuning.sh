#!/usr/bin/env bash
# The counterpart of the official ptuning/train.sh: P-Tuning v2 on ADGEN.
# Variables, named as there; unset ones keep the recipe's value (128 and 2e-2 for 6B models, smaller for glm-tiny):
#   PRE_SEQ_LEN=128     length of the prefix
#   LR=2e-2             learning rate
#   NUM_GPUS=1          more than one starts torchrun; rows per step grow with it
#   MODEL=chatglm2-6b   preset, hub id or folder; default: the embedded glm-tiny
#   DATA=adgen          a name in configs/data, or a file of rows
#   OUTPUT_DIR=runs/ptuning
# Further words are Hydra overrides of `glmtune train`:
#   MODEL=THUDM/chatglm2-6b bash scripts/train_ptuning.sh trainer.max_steps=1000 trainer.gradient_checkpointing=true
set -euo pipefail

PRE_SEQ_LEN=${PRE_SEQ_LEN:-}
LR=${LR:-}
NUM_GPUS=${NUM_GPUS:-1}
MODEL=${MODEL:-glm-tiny}
DATA=${DATA:-adgen}
OUTPUT_DIR=${OUTPUT_DIR:-runs/ptuning}

command=(glmtune)
if [ "$NUM_GPUS" != 1 ]; then
    command=(torchrun --standalone --nnodes=1 --nproc-per-node="$NUM_GPUS" -m glmtune)
fi
"${command[@]}" train +recipe=ptuning data="$DATA" model.source="$MODEL" output_dir="$OUTPUT_DIR" \
    ${PRE_SEQ_LEN:+prefix.pre_seq_len="$PRE_SEQ_LEN"} ${LR:+trainer.learning_rate="$LR"} "$@"
