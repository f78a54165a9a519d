#!/usr/bin/env bash
# Build sdist and wheel, install the wheel into an empty environment outside of the repository, and use it there.
# Usage: .ci/wheel.sh [PYTHON [DIST]]: the Python to build and to install it with (python3); a folder that `make build`
# made, to test its wheel. CONSTRAINTS: a file for pip (constraints.txt); empty: the newest releases, as a stranger gets.
set -euo pipefail
unset PYTHONPATH PYTHONDONTWRITEBYTECODE # the processes share what the first one compiles
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
python=$(realpath -s "$(command -v "${1:-python3}")")
constraints=${CONSTRAINTS-$root/constraints.txt}
dist=${2:+$(realpath -e "$2")}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

make_environment() { # its folder, what to install
	"$python" -m venv --without-pip "$1"
	"$python" -m pip --python "$1/bin/python" install -q --no-compile ${constraints:+-c "$constraints"} "$2"
}
# Here and in `make build` the wheel is built from the sdist, so the sdist has all that building needs.
if [[ -z $dist ]]; then
	dist=dist
	make_environment tools build
	tools/bin/python -m build --outdir $dist "$root" >build.log || { cat build.log && exit 1; }
fi
wheels=("$dist"/*.whl)
[[ ${#wheels[@]} == 1 ]] || { echo "$dist has ${#wheels[@]} wheels instead of one" && exit 1; }
wheel=${wheels[0]}
"$python" - "$wheel" "$root" <<'PYTHON'
import sys
from pathlib import Path
from zipfile import ZipFile

wheel, root = ZipFile(sys.argv[1]), Path(sys.argv[2])
found = set(wheel.namelist())
package = root / "src" / "dinosr_hf"
expected = {str(path.relative_to(root / "src")) for path in package.rglob("*.*") if "__pycache__" not in path.parts}
expected |= {f"dinosr_hf/recipes/{path.name}" for path in (root / "examples" / "configs").glob("*.yaml")}
expected |= {"dinosr_cli.py", "dinosr_hf/py.typed"}
assert expected <= found, f"the wheel lacks {sorted(expected - found)}"
others = {name for name in found - expected if ".dist-info/" not in name}
assert not others, f"the wheel has {sorted(others)}"
assert any(name.endswith(".dist-info/licenses/LICENSE") for name in found), "the wheel lacks its licence"
PYTHON

make_environment env "$wheel[demo]"
env/bin/dinosr --help >/dev/null
[[ $(env/bin/dinosr recipes) == *tiny_cpu* ]]
env/bin/dinosr demo --steps 5 --output_dir model --synthetic_utterances 6 --step_seconds 20 --test_utterances 3 \
	--codebook_size 16 --num_threads 1
env/bin/python - <<'PYTHON'
import dinosr_hf
from transformers import AutoModel

assert "site-packages" in dinosr_hf.__file__, dinosr_hf.__file__
print(f"{type(AutoModel.from_pretrained('model')).__name__} from {dinosr_hf.__version__} of the wheel")
PYTHON
