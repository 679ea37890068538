#!/usr/bin/env bash
# The counterpart of the official ptuning/evaluate.sh: answer the ADGEN test rows with a tuned prefix and score them.
# Variables, named as there:
#   CHECKPOINT=ptuning  run folder: a path, or a name under runs/ or output/
#   STEP=3000           which checkpoint of it; default: its last one
#   PRE_SEQ_LEN=128     only a check: the length is read from the file, another length is an error
#   NUM_GPUS=1          prediction runs in one process, so only 1 is accepted
# Further words are Hydra overrides of `glmtune predict`:
#   CHECKPOINT=adgen-chatglm2-6b-pt STEP=3000 bash scripts/evaluate.sh model=chatglm2-6b generation=official_sampling
set -euo pipefail

CHECKPOINT=${CHECKPOINT:-ptuning}
STEP=${STEP:-}
PRE_SEQ_LEN=${PRE_SEQ_LEN:-}
NUM_GPUS=${NUM_GPUS:-1}

if [ "$NUM_GPUS" != 1 ]; then
    echo "NUM_GPUS is $NUM_GPUS, but prediction runs in one process: use NUM_GPUS=1 (rows are batched instead)." >&2
    exit 2
fi
run=
for folder in "$CHECKPOINT" "runs/$CHECKPOINT" "output/$CHECKPOINT"; do
    if [ -d "$folder" ]; then
        run=$folder
        break
    fi
done
if [ -z "$run" ]; then
    echo "CHECKPOINT is $CHECKPOINT, but there is no folder $CHECKPOINT, runs/$CHECKPOINT or output/$CHECKPOINT." \
        "Give the run folder that training wrote." >&2
    exit 2
fi
prefix=$run${STEP:+/checkpoint-$STEP}
if [ ! -d "$prefix" ]; then
    found=$(cd "$run" && echo checkpoint-*)
    echo "STEP is $STEP, but there is no folder $prefix. $run holds: $found." >&2
    exit 2
fi
output=$run/predict${STEP:+-checkpoint-$STEP}

# 64 and 64 tokens are the official lengths of the evaluation; answers may be as long as references.
glmtune predict data=adgen data.max_source_length=64 data.max_target_length=64 \
    prefix_path="$prefix" output_dir="$output" ${PRE_SEQ_LEN:+pre_seq_len="$PRE_SEQ_LEN"} "$@"
glmtune score predictions="$output/generated_predictions.jsonl"
