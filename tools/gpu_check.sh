#!/usr/bin/env bash
# Checks jaxlm on this machine's GPU in under 8 minutes, and writes what it measured into docs/gpu.md: the tests marked
# `gpu`, sweeps of `jaxlm bench` beside PyTorch and beside their plans, and a trace. Without a GPU it does all of that
# with a small model on the CPU, and leaves docs/gpu.md as it is.
#
#   tools/gpu_check.sh            check; OUT=FOLDER for the results (runs/gpu_check), PYTHON=... for the interpreter
#   tools/gpu_check.sh --wheels   download the few pure packages that a machine with JAX and without network may lack
#
# It needs jax 0.10 to 0.12 with its CUDA plugin, flax, optax, orbax-checkpoint, numpy, rich, jinja2 and pytest, for the
# comparison torch; no TensorFlow and no network.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

WHEELS=gpu_wheels
PACKAGES="absl-py ml_collections universal_pathlib pathlib_abc"
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

case "${1:-}" in
"") ;;
--wheels) exec "$PYTHON" -m pip download --quiet --no-deps --dest "$WHEELS" $PACKAGES ;;
*) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit $([ "$1" = --help ] && echo 0 || echo 2) ;;
esac

OUT=${OUT:-runs/gpu_check}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if ! "$PYTHON" -c 'import absl, ml_collections, upath' 2>/dev/null; then
    [ -d "$WHEELS" ] || { echo "gpu_check.sh: packages are missing, and there is no $WHEELS: run it with --wheels where there is a network" >&2; exit 2; }
    # Only what is missing, and never a newer copy of what is there.
    "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" --target "$OUT/packages" $PACKAGES || exit 2
    export PYTHONPATH=$PYTHONPATH:$OUT/packages
fi

# Programs that two parts compile are compiled once; several processes share the GPU's memory.
export JAX_COMPILATION_CACHE_DIR=$OUT/compiled XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=3
BACKEND=$("$PYTHON" -c 'import jax; print(jax.default_backend())') || exit 2
STARTED=$SECONDS
STATUS=0
echo "on $BACKEND; results go to $OUT"

# part NAME SECONDS COMMAND...: runs a part for at most that long, with its output in a file.
part() {
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    if timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.txt" 2>"$OUT/$name.err"; then
        echo "$name: passed in $((SECONDS - began)) s"
    else
        STATUS=1
        echo "$name: FAILED after $((SECONDS - began)) s; the end of $OUT/$name.txt and .err:"
        tail -n 5 "$OUT/$name.txt" "$OUT/$name.err"
    fi
}

SYNTHETIC="--config.data.source=synthetic --config.optim.accum_steps=1 --config.parallel.devices=1"
if [ "$BACKEND" = gpu ]; then
    MODEL="--config gpt2_124m $SYNTHETIC"
    LLAMA="--config llama_1b $SYNTHETIC"
    BATCHES=12,48 BATCH=12 LLAMA_BATCH=4 STEPS="--steps 10 --rounds 3"
else
    SMALL="--config.model.num_layers=2 --config.model.d_model=128 --config.model.num_heads=2 --config.seq_len=64"
    SMALL="$SMALL --config.data.vocab_size=512"
    MODEL="--config gpt2_124m $SYNTHETIC $SMALL"
    LLAMA="--config llama_1b $SYNTHETIC $SMALL --config.model.num_kv_heads=1 --config.model.d_ff=256"
    BATCHES=2,4 BATCH=2 LLAMA_BATCH=2 STEPS="--steps 2 --rounds 2"
fi
TORCH=$("$PYTHON" -c 'import torch' 2>/dev/null && echo --torch)

part tests 180 env JAXLM_TEST_DEVICE=real "$PYTHON" -m pytest -q -o addopts= -o filterwarnings=default -m gpu tests/gpu
part batches 140 "$PYTHON" -m jaxlm bench $MODEL $STEPS $TORCH --grid batch_size=$BATCHES --html "$OUT/batches.html"
part remat 80 "$PYTHON" -m jaxlm bench $MODEL $STEPS --config.batch_size=$BATCH --grid model.remat=none,full
part llama 80 "$PYTHON" -m jaxlm bench $LLAMA $STEPS $TORCH --grid batch_size=$LLAMA_BATCH
part trace 60 "$PYTHON" -m jaxlm train $MODEL --workdir "$OUT/run" --config.batch_size=$BATCH --config.steps=12 \
    --config.optim.warmup_steps=1 --config.log.profile_steps=3 --config.log.tensorboard=false --config.eval.batches=1
"$PYTHON" tools/gpu_table.py "$OUT" $([ "$BACKEND" = gpu ] && echo docs/gpu.md) || STATUS=1
echo "traces: $(find "$OUT/run/profile" -name '*.xplane.pb' 2>/dev/null | tail -n 1)"
echo "all done in $((SECONDS - STARTED)) s"
exit $STATUS
