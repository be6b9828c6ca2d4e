#!/usr/bin/env bash
# Runs every combination of methods, eps and seeds of a config, one after the other, and prints their table.
# What is finished already returns at once, and what was stopped continues.
#
#   launch/table.sh configs/digits_r18.py "advmoe at_moe at_sdense at_dense natural" "0.1 0.2" "0 1 2" [--config.FIELD=VALUE ...]
set -euo pipefail
if [ $# -lt 4 ]; then
  sed -n '2,5p' "$0" >&2
  exit 2
fi
config=$1 methods=$2 budgets=$3 seeds=$4
shift 4
python=${PYTHON:-python}
runs=${RUNS:-runs}
name=$(basename "$config" .py)
for seed in $seeds; do
  for eps in $budgets; do
    for method in $methods; do
      "$python" -m advmoe_jax.main --config "$config:$method" --workdir "$runs/${name}_${method}_eps${eps//\//-}_s$seed" \
        --config.seed="$seed" --config.attack.eps="$eps" "$@"
    done
  done
done
"$python" -m advmoe_jax.main --mode report --workdir "$runs/${name}_*_eps*_s*" | tee "$runs/$name.md"
