#!/usr/bin/env bash
# All ranks on this machine, saving often: launchers/local.sh train.py [args]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "${PYTHON:-python3}" -m paddle_ft.launch --config "$here/configs/local.toml" "$@"
