#!/usr/bin/env bash
# The first hour on a CUDA device. Needs torch and one GPU, downloads nothing; results go to $OUT, else runs/gpu.
#   tools/evidence/gpu.sh              checks and measures, at most 9 minutes
#   tools/evidence/gpu.sh pack         anywhere, beforehand: CIFAR-10 of $IKL_PLUGINS_DATA or data/ into $OUT/cifar10.pt
#   tools/evidence/gpu.sh miniature    trains and attacks that file, or $MINIATURE_DATA, at most 9 minutes
# PYTHON names the interpreter; DEVICE=cpu QUICK=--quick rehearses. Each part has a time limit, none stops the others.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2
PYTHON=${PYTHON:-python3} OUT=${OUT:-runs/gpu} DEVICE=${DEVICE:-cuda} QUICK=${QUICK:-}
export PYTHONPATH="$PWD:$PWD/tools:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
mkdir -p "$OUT"
failed=()

part() {  # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begin=$SECONDS code
    shift 2
    echo "== $name, at most $limit s"
    timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    tail -n 15 "$OUT/$name.log"
    echo "$name,$code,$((SECONDS - begin))" >>"$OUT/parts.csv"
    [ "$code" = 0 ] || failed+=("$name ($code)")
}
has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }
end() {
    if [ ${#failed[@]} -gt 0 ]; then echo "Failed: ${failed[*]}" >&2; exit 1; fi
    echo "All parts passed; results in $OUT"
    exit 0
}

data=${MINIATURE_DATA:-$OUT/cifar10.pt}
case "${1:-}" in
pack)
    "$PYTHON" -m evidence.miniature pack "$data"
    exit
    ;;
miniature)
    echo "part,status,seconds" >"$OUT/parts.csv"
    part miniature 530 "$PYTHON" -m evidence.miniature run "$data" "$OUT" --device "$DEVICE" $QUICK
    end
    ;;
"") ;;
*)
    echo "gpu.sh: the part must be pack, miniature or left out, got '$1'." >&2
    exit 2
    ;;
esac

echo "part,status,seconds" >"$OUT/parts.csv"
part versions 40 "$PYTHON" -m evidence.device versions "$OUT" "$DEVICE"
folders=(tests/core tests/adversarial tests/gpu)
for host in torchdistill mmpretrain; do
    if has "$host"; then folders+=("tests/$host"); else echo "SKIPPED: $host is not installed, its tests do not run"; fi
done
if has pytest; then
    workers=()
    if has xdist && [ "$(nproc)" -ge 8 ]; then workers=(-n 6 --dist loadfile); fi
    [ -z "$QUICK" ] || folders=(tests/adversarial/test_schedule.py)
    # Whatever warns on a device that nobody has seen yet is no failure.
    IKL_PLUGINS_TEST_DEVICE=$DEVICE OMP_NUM_THREADS=2 part tests 210 "$PYTHON" -m pytest -m gpu -q -W default \
        -p no:cacheprovider --continue-on-collection-errors --junitxml "$OUT/tests.xml" \
        ${workers[@]+"${workers[@]}"} "${folders[@]}"
else
    echo "SKIPPED: pytest is not installed, no test runs"
    failed+=(pytest)
fi
bench=("$PYTHON" tools/bench.py --output "$OUT" --device "$DEVICE" --threads 4)
part device 50 "${bench[@]}" device
if [ -z "$QUICK" ]; then  # on a CPU these are `make bench`
    part losses 90 "${bench[@]}" losses --seconds 0.8
    part adversarial 80 "${bench[@]}" adversarial --seconds 8
    if has torchdistill; then
        part training 50 "${bench[@]}" training --seconds 10
    else
        echo "SKIPPED: torchdistill is not installed, its training step is not measured"
    fi
fi
"$PYTHON" -m evidence.device collect "$OUT" "$DEVICE" || failed+=(collect)
end
