#!/usr/bin/env bash
# Train most rows of docs/results_runs.md. Rows that are already in the file OUT are skipped.
#
#     DATA_ROOT=DIR RUN_ROOT=DIR OUT=benchmarks/results/recommenders.json bash benchmarks/recommenders.sh ml-100k
#
# DATA_ROOT must have the dataset, its embedding td, and the semantic IDs that the flags name:
#   ml-100k: on fused-concat (td and cf, weights 1 and 2), rqvae with 64 codes and the tag 64, and opq
#   Industrial_and_Scientific: rqvae and opq on td
#   Beauty, Toys_and_Games: opq on fused-concat (td and cf, equal weights); Beauty also rqvae
#   ml-1m: opq on fused-concat (td and cf, equal weights) with 8 levels and the tag 8
# One row takes 3 to 40 minutes on one core. Commands with different datasets can run side by side.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
dataset=${1:?the name of a dataset}
rows() {
    python benchmarks/recommenders.py --dataset "$dataset" --data_root "${DATA_ROOT:-data}" \
        --run_root "${RUN_ROOT:-runs}" --out "${OUT:-benchmarks/results/recommenders.json}" "$@"
}
rows --seeds 0 popularity markov transitions neighbours counting "counting --neighbours_from tfidf"
learning="--prior counting --teacher transitions"
taught="$learning --teacher_temperature 1" sharp="$learning --teacher_temperature 0.125"
weak="$learning --teacher_weight 0.2 --teacher_temperature 0.125"
case $dataset in
ml-100k)
    codes="--embedding_suffix fused-concat --tag 64"
    retrieve="encoder_retrieve --quantizer_name opq --embedding_suffix fused-concat --max_steps 4000 --lr 0.002 \
--temperature 0.1 --dropout 0.1"
    small="sasrec --num_layers 1 --max_steps 20000"
    long="sasrec --max_steps 8000 --patience null --batch_size 1024 --lr 0.002 --max_history 200"
    rows --seeds 0,1,2 "$small --prior counting" "$small $taught" "$small $sharp" \
        "$long --prior counting" "$long $weak" "$small $weak" "$retrieve $weak" \
        "sasrec --num_layers 1 --max_steps 10000 $sharp" "encoder_decoder $codes --dropout 0 $sharp" \
        "decoder_only $codes $sharp" "$retrieve $sharp" "gru4rec --max_steps 4000 $sharp" \
        "gru4rec --max_steps 4000 --prior counting" "gru4rec --max_steps 4000 $taught --teacher_weight 0.8" \
        "encoder_decoder $codes --dropout 0 --prior counting" "encoder_decoder $codes --teacher transitions --teacher_temperature 1" \
        "encoder_decoder $codes --dropout 0.05 --prior counting" \
        "encoder_decoder $codes --dropout 0 --max_steps 10000 --prior counting" \
        "encoder_decoder $codes --encoder_positions code" \
        "decoder_only $codes --prior counting" "decoder_only $codes $taught" \
        "$retrieve --prior counting" "$retrieve $taught"
    ;;
Industrial_and_Scientific)
    retrieve="encoder_retrieve --quantizer_name opq --lr 0.005 --max_steps 2500 --temperature 0.1 --prior counting"
    rows --seeds 0,1,2 "$retrieve" "$retrieve --teacher counting --teacher_temperature 1" \
        "sasrec --num_layers 1 --prior counting" "sasrec --num_layers 1 --prior counting --teacher counting --teacher_temperature 1" \
        "gru4rec --prior counting" "gru4rec --prior counting --teacher counting --teacher_temperature 1" \
        "encoder_decoder" "encoder_decoder --teacher counting --teacher_temperature 1" \
        "encoder_decoder --teacher counting --teacher_temperature 1 --dropout 0 --prior counting" "decoder_only --prior counting" \
        "decoder_only --prior counting --teacher counting --teacher_temperature 1"
    ;;
Beauty | Toys_and_Games)
    retrieve="encoder_retrieve --quantizer_name opq --embedding_suffix fused-concat --lr 0.002 --epochs 34 --eval_every 4 \
--patience null --dropout 0.2 --temperature 0.1"
    decoder="encoder_decoder --embedding_suffix fused-concat --epochs 30 --max_steps 50000 --eval_every 10 \
--max_history 20 --num_beams 20 --dropout 0.05"
    for teacher in "" " --teacher counting --teacher_temperature 0.25"; do
        with="--prior counting$teacher"
        rows --seeds 0 "$retrieve $with" "sasrec --d_model 64 --num_layers 1 --max_steps 20000 $with"
        if [ "$dataset" = Beauty ]; then
            rows --seeds 0 "$decoder $with"
        fi
    done
    ;;
ml-1m)
    fast="--batch_size 1024 --lr 0.002 --max_history 200 --max_steps null --eval_every 2"
    small="sasrec --num_layers 2 $fast --dropout 0.2 --epochs 22"
    retrieve="encoder_retrieve --quantizer_name opq --embedding_suffix fused-concat --tag 8 $fast --epochs 16 \
--dropout 0.1 --temperature 0.1"
    rows --seeds 0 "$small --prior counting" "$small $weak" "$retrieve $weak"
    rows --seeds 0,1,2 "$retrieve --prior counting"
    ;;
esac
