#!/usr/bin/env bash
# Runs the tests marked fuzz with one random seed after another, until the time is up or one fails.
#
#   bash scripts/fuzz.sh        for ten minutes, with the Python of the environment
#   bash scripts/fuzz.sh 60     for an hour
#
# A failure prints its seed: FUZZ_SEED=123 python -m pytest -m fuzz runs it again. FUZZ_COUNT is the number of inputs.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! [[ "${1:-10}" =~ ^[1-9][0-9]*$ ]]; then
  echo "scripts/fuzz.sh: pass a number of minutes, 1 or more, not $1" >&2
  exit 2
fi
end=$((SECONDS + ${1:-10} * 60))
runs=0
while [ "$SECONDS" -lt "$end" ]; do
  seed=$((RANDOM * 32768 + RANDOM))
  if ! FUZZ_SEED=$seed python -m pytest -m fuzz -x; then
    echo "scripts/fuzz.sh: FUZZ_SEED=$seed failed" >&2
    exit 1
  fi
  runs=$((runs + 1))
done
echo "scripts/fuzz.sh: $runs seeds, no failure"
