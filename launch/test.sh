#!/usr/bin/env bash
# Run the tests in the environment that run.sh uses: ./launch/test.sh [pytest arguments]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/setup.sh" dev
cd "$root"
exec .venv/bin/python -m pytest "$@"
