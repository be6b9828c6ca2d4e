#!/usr/bin/env bash
# Runs a training on a Cloud TPU pod slice. DRY_RUN=1 prints the commands and does nothing.
#
#   launch/tpu_pod.sh create                    the slice NAME of TYPE in ZONE
#   launch/tpu_pod.sh install                   this repository and its packages on every worker
#   launch/tpu_pod.sh run ARGUMENTS ...         python -m advmoe_jax.main ARGUMENTS on all workers, again while it is preempted
#   launch/tpu_pod.sh delete
#
# Environment: NAME (advmoe), ZONE (us-central2-b), TYPE (v4-32), VERSION (tpu-ubuntu2204-base).
# --workdir must be a folder that every worker sees, such as a mounted bucket or Filestore.
set -euo pipefail
NAME=${NAME:-advmoe} ZONE=${ZONE:-us-central2-b} TYPE=${TYPE:-v4-32} VERSION=${VERSION:-tpu-ubuntu2204-base}
ROOT=$(cd "$(dirname "$0")/.." && pwd)

call() {
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

on_all_workers() {
  call gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"
}

case "${1:-}" in
  create)
    call gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" --accelerator-type "$TYPE" --version "$VERSION"
    ;;
  install)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    call git -C "$ROOT" archive --format=tar.gz --output "$archive" HEAD
    call gcloud compute tpus tpu-vm scp "$archive" "$NAME:advmoe_jax.tar.gz" --zone "$ZONE" --worker=all
    on_all_workers 'mkdir -p advmoe_jax && tar -xzf advmoe_jax.tar.gz -C advmoe_jax && cd advmoe_jax && python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --python 3.11 .venv && ~/.local/bin/uv pip install --quiet "jax[tpu]" -e ".[quickstart]"'
    ;;
  run)
    shift
    command="cd advmoe_jax && .venv/bin/python -m advmoe_jax.main --coordinator auto $(printf '%q ' "$@")"
    status=0
    on_all_workers "$command" || status=$?
    while [ "$status" -eq 75 ]; do  # preempted and saved: run me again
      sleep 10
      status=0
      on_all_workers "$command" || status=$?
    done
    exit "$status"
    ;;
  delete)
    call gcloud compute tpus tpu-vm delete "$NAME" --zone "$ZONE" --quiet
    ;;
  *)
    sed -n '2,11p' "$0" >&2
    exit 2
    ;;
esac
