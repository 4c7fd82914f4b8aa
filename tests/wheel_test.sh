#!/usr/bin/env bash
# The wheel on its own: wheel_test.sh WHEEL DEPENDENCIES. Installed without the checkout in sight, it shows its help
# and reads the golden file from an empty folder. DEPENDENCIES is a site-packages folder, so that nothing is fetched
# twice; an editable install in there is not seen, because its .pth file is not read from PYTHONPATH.
set -euo pipefail
wheel=$(realpath "$1") dependencies=$(realpath "$2") golden=$(realpath tests/formats/golden/v1.qtm)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-deps "$wheel"
top=$(cd "$folder"/env/lib/python3*/site-packages && ls -d calibration formats qtool | xargs)
test "$top" = "calibration formats qtool"
mkdir "$folder/empty" && cd "$folder/empty"
export PYTHONPATH=$dependencies
qtool=$folder/env/bin/qtool
"$qtool" --help | grep -q compress
"$qtool" inspect "$golden" --tensors | grep -q 'blocks.4.weight'
"$qtool" verify "$golden"
"$folder/env/bin/python" -c "import qtool; assert 'env/lib' in qtool.__file__, qtool.__file__"
