#!/bin/bash
# Measures the full-size network on this machine's GPU, at most 8 minutes, and checks the figures against goals.
#
#   scripts/gpu_check.sh [OUT]    openflamingo_3b, random weights, float16; OUT: default out/gpu_check
#   DEVICE=cpu PRESET=tabletop MINUTES=0.3 scripts/gpu_check.sh   the same script where there is no GPU
#
# It writes OUT/steps.json (decisions against eager, waits, allocations, reloading of layers) and OUT/model.json
# (`benchmark model`: stages, roofline, ratios to the plain way), and ends with 1 if a goal is missed.
set -euo pipefail
OUT=$(realpath -m "${1:-$(dirname "$0")/../out/gpu_check}")
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
PRESET=${PRESET:-openflamingo_3b}
MINUTES=${MINUTES:-4}
mkdir -p "$OUT"
rm -f "$OUT/steps.json" "$OUT/model.json"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=0
"$PYTHON" scripts/gpu_check.py --preset "$PRESET" --device "$DEVICE" --steps "${STEPS:-200}" --json "$OUT/steps.json" || failed=1
"$PYTHON" -m deer_vla_ros benchmark model --preset "$PRESET" --random-weights --device "$DEVICE" \
    --minutes "$MINUTES" --json "$OUT/model.json" --plot "$OUT/model.png" || failed=1
"$PYTHON" scripts/gpu_check.py --goals "$OUT/steps.json" "$OUT/model.json" || failed=1
exit $failed
