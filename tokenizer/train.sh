#!/usr/bin/env bash
# Trains a sentencepiece model for data.tokenizer.model:
#   tokenizer/train.sh MODEL VOCAB_SIZE FILES... [--text-field NAME] [--training-bytes N]
set -euo pipefail
[ -n "${PYTHON:-}" ] || . "$(dirname -- "$0")/../launch/environment.sh"
exec "${PYTHON:-python3}" -m infini_ds.data.train_tokenizer "$@"
