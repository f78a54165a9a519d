#!/usr/bin/env bash
# transformers' own common model tests, on the classes of this checkout.
#
#   tests/hf_common/run.sh [PYTHON] [pytest arguments, e.g. -k DinoSRForCTCTest]
#
# PYTHON (.venv/bin/python by default) decides the version of transformers; the tests are those of its sdist, which pip
# downloads once. Prints, last,
#   hf-common-suite: 1048 passed, 0 failed, 674 skipped
# and exits 0 only where tests ran and none failed.
#
#   HF_COMMON_CACHE    where the sdist is kept (dinosr-hf in XDG_CACHE_HOME or ~/.cache); put one there to work offline
#   HF_COMMON_SDIST    the sdist, or an archive of the repository, of exactly the installed version (found in the cache)
#   HF_COMMON_WORKERS  processes (2)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(cd "$here/../.." && pwd)
python=${1:-$checkout/.venv/bin/python}
shift || true
cache=${HF_COMMON_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dinosr-hf}
work=$(mktemp -d)
suite=
trap '[ -z "$suite" ] || kill "$suite" 2>/dev/null || true; rm -rf "$work"' EXIT
mkdir -p "$cache" "$work"/{transformers,suite,home}

give_up() {
    echo "$1" >&2
    echo "hf-common-suite: 0 passed, 1 failed, 0 skipped"
    exit 1
}

python=$(realpath -s "$(command -v "$python" || echo "$python")")
version=$("$python" -c 'import transformers; print(transformers.__version__)' 2>"$work/log") ||
    give_up "$python cannot import transformers: $(tail -n 1 "$work/log")"

sdist=${HF_COMMON_SDIST:-$cache/transformers-$version.tar.gz}
if [ ! -f "$sdist" ]; then
    echo "Downloading the tests of transformers $version"
    "$python" -m pip download -qq --no-deps --no-binary transformers -d "$work" "transformers==$version" \
        >"$work/log" 2>&1 ||
        give_up "no sdist of transformers $version: $(tail -n 1 "$work/log")"
    mv "$work/transformers-$version.tar.gz" "$sdist"
fi
tar -xzf "$sdist" -C "$work/transformers" --strip-components=1 --wildcards '*/tests/*'
# A regular package wins over any other tests/ on the path.
touch "$work/transformers/tests/__init__.py"
# The suite runs from a copy: pytest must not see the project's own tests/, conftest.py and settings.
cp "$here"/{*.py,*.txt} "$work/suite/"

status=0
(
    cd "$work/suite"
    exec env -u TRANSFORMERS_TINY_MODEL_PATH -u RUN_SLOW \
        PYTHONPATH="$work/transformers:$work/suite:$checkout/src" PYTHONHASHSEED=0 \
        HF_HOME="$work/home" HF_HUB_OFFLINE=1 HF_COMMON_SUMMARY="$work/summary" TRANSFORMERS_TEST_DEVICE=cpu \
        OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false TMPDIR="$work" \
        "$python" -m pytest -c /dev/null --rootdir="$work/suite" --import-mode=importlib -p no:cacheprovider \
        -q -W ignore --tb=short -o verbosity_subtests=0 --timeout=600 -n "${HF_COMMON_WORKERS:-2}" "$@"
) &
suite=$!
wait "$suite" || status=$?
suite=
[ -f "$work/summary" ] || give_up "pytest ended with $status before any summary"
line=$(cat "$work/summary")
case $line in
    *" 0 passed, 0 failed,"*) give_up "no test ran" ;;
esac
echo "$line"
[ "$status" -eq 0 ] && [[ $line == *", 0 failed,"* ]]
