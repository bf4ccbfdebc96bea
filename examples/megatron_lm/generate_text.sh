#!/usr/bin/env bash
# Continue a text with a trained GPT.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -lt 2 ]; then
  echo "usage: $(basename "$0") LOAD PROMPT [further flags of tools/generate.py]" >&2
  exit 2
fi
"${PYTHON:-python}" "$here/../../tools/generate.py" --load "$1" --prompt "$2" \
  --max-new-tokens 100 --temperature 1.0 --top-p 0.9 "${@:3}"
