#!/usr/bin/env bash
# A half hour on a card in four commands, each under nine minutes: tools/gpu_day.sh 1 (then 2, 3, 4).
# Further words go to `python -m benchmarks.gpu`, as --no-compile, --wheels FOLDER or --device cpu --quick.
# docs/gpu_testing.md says what each does and what to do with the results, which are in $OUT or build/gpu_day.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:?which of the four: 1, 2, 3 or 4}
shift
results=${OUT:-build/gpu_day}
mkdir -p "$results"
export PYTHONUNBUFFERED=1
status=0

day() {
  "${PYTHON:-python3}" -m benchmarks.gpu "$@" --results "$results" || status=$?
}

{
  day --take benchmarks/results/gpu # what earlier commands brought home is not measured again
  case $part in
  1) day --only ceilings --only tests --minutes 7 "$@" ;;
  2) day info_nce sigmoid_loss contrastive_distillation linear_cross_entropy distillation linear_distillation \
    embedding_distillation gated_residual gated_linear_residual --only timing --minutes 7 "$@" ;;
  3) day interval_attention perceiver_attention linear mlp gated_mlp srau topk_similarity retrieval_ranks \
    mine_hard_negatives relative_representation relative_similarity contrastive_search_score nms roi_align \
    --only timing --minutes 7 "$@" ;;
  4)
    day sweep --minutes 3.5 "$@"
    day --only sanitizer --minutes 3.5 "$@"
    ;;
  *) echo "no part $part: 1, 2, 3 or 4" && status=2 ;;
  esac
  exit "$status"
} 2>&1 | tee -a "$results/day-$part.log" 2>/dev/null # of a full disk the run itself tells
