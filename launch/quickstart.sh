#!/usr/bin/env bash
# The whole program on a fresh machine with Python 3.11+, git and a network, GPU or not, in under ten minutes:
# installs it into .venv, gets a real small model, trains it sharded and in 4 bits, shows what it has learnt.
#
#   launch/quickstart.sh [options of train.py]
#
# Run again, it reuses .venv and the model. PYTHON=python3.12 picks another interpreter (launch/venv.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for word in "$@"; do
    name=${word%%=*}
    case ${name//-/_} in
        __config | __model_name | __dataset | __output_dir | __overwrite_output_dir)
            echo "launch/quickstart.sh: $name is set here already; omit it, or start train.py yourself" >&2
            exit 2
            ;;
    esac
done

MODEL=models/smollm2-135m-instruct
OUTPUT=output/quickstart
CONFIG=configs/tiny_cpu.yaml
DATA=launch/quickstart_data

echo "quickstart: 1/4 installing into .venv"
bash launch/venv.sh

echo "quickstart: 2/4 a real small model"
TQDM_DISABLE=1 .venv/bin/python launch/get_smollm2.py "$MODEL"

# one rank per GPU, but at most 2: more would leave these few rows too few steps
RANKS=$(.venv/bin/python -c 'import torch; print(min(torch.cuda.device_count() or 2, 2))')
echo "quickstart: 3/4 training on $RANKS ranks"
LOGLEVEL=ERROR .venv/bin/torchrun --nproc_per_node "$RANKS" train.py --config "$CONFIG" --model_name "$MODEL" \
  --dataset "$DATA/train.jsonl" --output_dir "$OUTPUT" --overwrite_output_dir true "$@"

echo "quickstart: 4/4 asking the model before and after"
.venv/bin/python -m fsdp_qlora evaluate --adapter "$OUTPUT" --dataset "$DATA/heldout.jsonl" --measures exact \
  --max_new_tokens 24 --at_least 0.8 --output_dir "$OUTPUT/evaluation" --overwrite_output_dir true
echo "quickstart: done in $((SECONDS / 60)) min $((SECONDS % 60)) s; the adapter is in $OUTPUT"
