#!/bin/sh
# The whole recipe on one GPU: run_gpu.sh OUT [options of run.py]. Needs .data/text.json.gz (prepare_text.py) for the real text.
set -e
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" recipes/bundled/run.py "$@"
