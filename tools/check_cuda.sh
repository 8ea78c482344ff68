#!/usr/bin/env bash
# Checks and times the CUDA path: tools/check_cuda.sh [FOLDER], in under 8 minutes.
# Needs a CUDA device, and of Python packages torch, triton, torchvision, numpy and scipy alone.
# Leaves checks.txt, benchmark.txt and benchmark.json in FOLDER (output/cuda).
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-output/cuda}
mkdir -p "$folder"
timeout 200 python3 -u tools/check_cuda.py 2>&1 | tee "$folder/checks.txt"
status=${PIPESTATUS[0]}
[ "$status" -eq 2 ] && exit 2 # no CUDA device
# Inference and operations for one image, then training for two.
PYTHONPATH=projects timeout 170 python3 -u tools/benchmark.py --bare --device cuda --repeats 11 \
    --parts sampling mixing_channels mixing_points mixing_statically decoder losses inference \
    --compile --output "$folder/benchmark.json" 2>&1 | tee "$folder/benchmark.txt"
timed=${PIPESTATUS[0]}
PYTHONPATH=projects timeout 90 python3 -u tools/benchmark.py --bare --device cuda --repeats 7 \
    --batch-size 2 --parts decoder train_step \
    --output "$folder/benchmark_train.json" 2>&1 | tee "$folder/benchmark_train.txt"
trained=${PIPESTATUS[0]}
exit $((status || timed || trained))
