#!/usr/bin/env bash
# Training on several nodes under SLURM, from a checkout; the arguments are those of train.py:
#
#   sbatch --nodes=4 examples/slurm.sh recipes/overlock_t.yaml --data /imagenet --out /shared/run
#
# Two minutes before the time limit, and when preempted, SLURM sends SIGUSR1: the run saves its
# state and ends, and the job goes back into the queue to resume. --out must lie where all nodes
# can read it. A lost process is restarted by torchrun, from the last checkpoint.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -u

case " $* " in
  *" --out "*) ;;
  *)
    echo "error: add --out FOLDER, which a requeued job resumes" >&2
    exit 2
    ;;
esac

stopped=
# of torchrun's signals, its processes take this one as a request to save and end
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# the first node hosts the rendezvous; jobs that share it take other ports
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv-backend=c10d --rdzv-endpoint="$host:$port" --rdzv-id="$SLURM_JOB_ID" --max-restarts=3 \
  train.py "$@" &
job=$!

wait "$job"
code=$?
# a trapped signal ends the first wait while the run is still saving
while kill -0 "$job" 2>/dev/null; do
  wait "$job"
  code=$?
done
if [ -n "$stopped" ] && [ "$code" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
