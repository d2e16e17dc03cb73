#!/bin/sh
# Everything that needs a CUDA device: the tests marked gpu, then the timings. Prints; writes to $OUT if that is set.
#
#     bench/gpu.sh [PYTHON]      PYTHON has torch with CUDA and Kiem's dependencies; default: .venv/bin/python
#
# Set QUICK=1 to leave out the timings.
cd "$(dirname "$0")/.." || exit 1
python=${1:-.venv/bin/python}
out=${OUT:-$(mktemp -d)}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c 'import sys, torch; print(sys.version.split()[0], torch.__version__, torch.cuda.get_device_name())' || exit 1
"$python" -m pytest -q -m gpu -p no:cacheprovider -p no:xdist --durations=5 tests/test_gpu.py 2>&1 | tee "$out/gpu-tests.txt"
[ -n "$QUICK" ] && exit 0
"$python" bench/gpt2_124m.py --device cuda --batch 16 --steps 10 --rounds 3 2>/dev/null | tee "$out/gpt2-124m.txt"
