#!/usr/bin/env bash
# All tests, in two halves at once, one thread each: one after the other they take about twice as
# long on two cores. With arguments: pytest with those, in one process. The exit status is that of
# what failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
if [ $# -gt 0 ]; then
    exec "$python" -m pytest "$@"
fi
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
half=(tests/backends tests/parallel tests/ops)  # the other half is all the rest
output=$(mktemp)
trap 'rm -f "$output"' EXIT
"$python" -m pytest "${half[@]}" >"$output" 2>&1 &
first=$!
status=0
"$python" -m pytest "${half[@]/#/--ignore=}" || status=$?
wait "$first" || status=$?
cat "$output"
exit "$status"
