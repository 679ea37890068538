#!/usr/bin/env bash
# The counterpart of the official ptuning/train_chat.sh: P-Tuning v2 on conversations of your own.
# Variables, named as there; unset ones keep the recipe's value (128 and 1e-2 for 6B models, smaller for glm-tiny):
#   CHAT_TRAIN_DATA=FILE          required: rows with prompt, response and history, or conversations, or messages
#   CHAT_VAL_DATA=FILE            rows for evaluation; default: none
#   CHECKPOINT_NAME=runs/ptuning_chat   where the run goes
#   PRE_SEQ_LEN=128     length of the prefix
#   LR=1e-2             learning rate
#   NUM_GPUS=1          more than one starts torchrun; rows per step grow with it
#   MODEL=chatglm2-6b   preset, hub id or folder; default: the embedded glm-tiny
# Further words are Hydra overrides of `glmtune train`:
#   CHAT_TRAIN_DATA=chats.jsonl bash scripts/train_chat.sh data.history_column=history data.loss_on=all_turns
set -euo pipefail

CHAT_TRAIN_DATA=${CHAT_TRAIN_DATA:-}
CHAT_VAL_DATA=${CHAT_VAL_DATA:-}
CHECKPOINT_NAME=${CHECKPOINT_NAME:-runs/ptuning_chat}
PRE_SEQ_LEN=${PRE_SEQ_LEN:-}
LR=${LR:-}
NUM_GPUS=${NUM_GPUS:-1}
MODEL=${MODEL:-glm-tiny}

if [ -z "$CHAT_TRAIN_DATA" ]; then
    echo "CHAT_TRAIN_DATA is empty, but training needs conversations. Name a file:" \
        "CHAT_TRAIN_DATA=chats.jsonl bash scripts/train_chat.sh" >&2
    exit 2
fi
command=(glmtune)
if [ "$NUM_GPUS" != 1 ]; then
    command=(torchrun --standalone --nnodes=1 --nproc-per-node="$NUM_GPUS" -m glmtune)
fi
"${command[@]}" train +recipe=ptuning_chat model.source="$MODEL" output_dir="$CHECKPOINT_NAME" \
    data.train_file="$CHAT_TRAIN_DATA" ${CHAT_VAL_DATA:+data.validation_file="$CHAT_VAL_DATA"} \
    ${PRE_SEQ_LEN:+prefix.pre_seq_len="$PRE_SEQ_LEN"} ${LR:+trainer.learning_rate="$LR"} "$@"
