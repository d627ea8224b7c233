#!/bin/sh
# The sections of benchmarks/step.py that CUDA has targets for, in at most eight minutes:
#     sh benchmarks/gpu.sh FOLDER
# Tables are written to FOLDER/tables.md, records to FOLDER/step.jsonl; nothing is installed.
set -u
cd "$(dirname "$0")/.."
folder=${1:?the folder to write tables to}
mkdir -p "$folder"
python=${PYTHON:-.venv/bin/python}
command -v "$python" > /dev/null || python=python3
status=0
: > "$folder/tables.md"
# A section that fails, or takes too long, leaves the others their time.
while read -r seconds section options; do
    # shellcheck disable=SC2086
    timeout -k 5 "$seconds" "$python" -m benchmarks.step $section --device cuda $options \
        --out "$folder/step.jsonl" >> "$folder/tables.md" 2> "$folder/$section.log" < /dev/null
    code=$?
    [ $code -eq 0 ] || { status=1; echo "$section: exit status $code"; tail -n 3 "$folder/$section.log"; }
done << SECTIONS
110 adamw --compiled
60 delta
60 tiny
80 muon
90 m3
50 memory
SECTIONS
cat "$folder/tables.md"
exit $status
