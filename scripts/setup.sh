# Sourced by the scripts beside it: `setup EXTRA` makes the virtual environment .venv (or $VENV) where it is missing and
# installs this package into it, editable, with that extra. A later call has nothing to do until pyproject.toml changes.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}

find_python() {
    local candidate candidates=(python3 python3.14 python3.13 python3.12 python3.11 python)
    if [[ -n "${PYTHON:-}" ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Found no Python 3.11 or newer that has venv. Install one, or name it: PYTHON=/path/to/python $0" >&2
    return 1
}

setup() {
    local extra=$1 python stamp="$VENV/.installed-$1"
    if [[ ! -x "$VENV/bin/pip" ]]; then
        python=$(find_python)
        echo "Making $VENV with $("$python" --version) ..."
        "$python" -m venv "$VENV"
    fi
    if [[ ! "$stamp" -nt pyproject.toml ]]; then
        echo "Installing braintrace[$extra] into $VENV, the first time for a few minutes ..."
        "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off --editable ".[$extra]" |
            awk '/^(Collecting|Installing)/ {print "  " $1, $2; fflush()}'
        touch "$stamp"
    fi
}
