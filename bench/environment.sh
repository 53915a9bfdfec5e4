# Sourced by the scripts here: builds the program and makes the Python environment. Sets $here, $ddpm and $python.
#
#     --venv FOLDER    the Python environment; target/bench/venv if not given, and made if it is not there
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
venv=
rest=()
while [ $# -gt 0 ]; do
    case $1 in
        --venv) venv=${2:?"--venv needs a folder"}; shift 2 ;;
        *) rest+=("$1"); shift ;;
    esac
done
for tool in cargo python3; do
    command -v $tool >/dev/null || { echo "$tool is missing" >&2; exit 1; }
done

target=${CARGO_TARGET_DIR:-$root/target}
cargo build --release --manifest-path "$root/Cargo.toml" -p ddpm-cli >&2
ddpm=$target/release/ddpm
[ -x "$ddpm" ] || ddpm=$ddpm.exe

# Packages that the script at hand needs are in $packages.
if [ -z "$venv" ]; then
    venv=$target/bench/venv
    [ -d "$venv" ] || python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $packages >&2
fi
python=$venv/bin/python
