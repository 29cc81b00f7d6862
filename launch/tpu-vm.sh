#!/bin/bash
# Trains on a TPU pod slice of Google Cloud without a cluster manager: one process on each of its hosts.
#
#   export NAME=mixtral ZONE=us-east5-a TYPE=v5p-128 REPOSITORY=https://... BUCKET=gs://...
#   launch/tpu-vm.sh create                     # asks for the slice; v5p-128 is 64 chips, v5p:4x4x4
#   launch/tpu-vm.sh install                    # clones the repository and installs it on every host
#   launch/tpu-vm.sh train configs/mixtral_8x7b.py /mnt/shared/runs/8x7b [flags of train.py]
#   launch/tpu-vm.sh log | stop | delete
#
# BUCKET is mounted on /mnt/shared on every host (gcsfuse), for the workdir, the token cache and the text. The hosts find
# each other by themselves, from the TPU's metadata. `train` again, after anything that ended it, continues the run.
set -euo pipefail

usage() {
  sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

[ $# -ge 1 ] || usage
command=$1
shift
for variable in NAME ZONE; do
  if [ -z "${!variable:-}" ]; then
    echo "error: $variable is not set" >&2
    usage
  fi
done

on_all() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

case $command in
create)
  # A queued resource waits until there is capacity; --spot costs less and can be taken away.
  gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
    --accelerator-type="${TYPE:?set TYPE, for example v5p-128}" --runtime-version="${RUNTIME:-v2-alpha-tpuv5}" ${SPOT:+--spot}
  ;;
install)
  : "${REPOSITORY:?set REPOSITORY to the address of this repository}" "${BUCKET:?set BUCKET to gs://NAME}"
  on_all "set -e
    command -v gcsfuse > /dev/null || { sudo apt-get update -q && sudo apt-get install -qy gcsfuse; }
    sudo mkdir -p /mnt/shared && sudo chown \$USER /mnt/shared
    mountpoint -q /mnt/shared || gcsfuse --implicit-dirs --rename-dir-limit=100000 ${BUCKET#gs://} /mnt/shared
    test -d mixtral_jax || git clone --quiet $REPOSITORY mixtral_jax
    cd mixtral_jax && python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt -r requirements-tpu.txt"
  ;;
train)
  [ $# -ge 2 ] || usage
  config=$1
  workdir=$2
  shift 2
  # nohup: the run outlives this connection; host 0 speaks, the others tell their errors only.
  on_all "cd mixtral_jax && nohup .venv/bin/python train.py --config=$config --workdir=$workdir $* >> \$HOME/train.log 2>&1 < /dev/null &"
  ;;
log)
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 --command="tail -n 50 -f \$HOME/train.log"
  ;;
stop)
  # SIGTERM: the step is finished and saved.
  on_all "pkill -TERM -f 'train.py --config=' || true"
  ;;
delete)
  gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
  ;;
*)
  usage
  ;;
esac
