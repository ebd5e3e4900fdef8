#!/usr/bin/env bash
# Sends to Weights & Biases what runs on compute nodes without a network have left. For the login node, again and again:
#
#     slurm/wandb_sync.sh                    # all of runs/
#     slurm/wandb_sync.sh runs/NAME ...      # some
#     */10 * * * * cd PROJECT && . .venv/bin/activate && slurm/wandb_sync.sh >> wandb_sync.log 2>&1    # crontab
#
# What the server has is not sent again; a run that is being trained waits until it has ended. Exit code 0: all is sent.
set -euo pipefail
shopt -s nullglob
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ $# -gt 0 ] || set -- runs/*/
[ $# -gt 0 ] || { echo "no run in runs/"; exit 0; }
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec python -m pipelines.wandb_sync "$@"
