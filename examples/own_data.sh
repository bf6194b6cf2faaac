#!/usr/bin/env bash
# From a folder of pairs with change masks to a model card with measured figures, by six commands.
#
#     examples/own_data.sh PAIRS OUT
#
# PAIRS holds images of both dates and their masks, in one of the layouts that README.md names ("From your own pairs to a
# published model"); nothing is written there. Stopped in training or evaluation, the same command goes on.
set -euo pipefail

pairs=${1:?the folder of pairs is missing: examples/own_data.sh PAIRS OUT}
out=${2:?the folder for results is missing: examples/own_data.sh PAIRS OUT}
model=${MODEL:-small}                     # what to start from: small, tiny, a folder or a Hub id
repo=${REPO:-me/my-model}                 # what it will be called on the Hub
license=${LICENSE:-other}                 # of the weights, by the Hub's names
places=${PLACES:-(.+)}                    # which part of a pair's name is its place; this: each pair is a place of its own
masks=${MASKS---binary-masks}             # one class, taken for buildings; empty: 128 is road, 255 building
steps=${STEPS:-}                          # of training; empty: the run chooses

recipe=$(dirname "$0")/small_data.yaml

echo "1/6  Questions and answers are built from the masks by rule, and the places split into train, val and test:"
deltavlm data build --images "$pairs" --split all --places "$places" $masks --output "$out/annotations" --overwrite

echo "2/6  Files, sizes and answers are checked; what is wrong is named, and ends this script:"
deltavlm data check "$out/annotations" --images "$pairs" --json "$out/check.json"

echo "3/6  The model learns from train, and the step that is best on val is kept:"
deltavlm train "$recipe" --set model="$model" data.source="$out/annotations" data.images="$pairs" \
    training.output_dir="$out/checkpoint" ${steps:+training.max_steps="$steps"}

echo "4/6  It is asked all questions of test, which it has not seen:"
deltavlm evaluate "$out/checkpoint" "$out/annotations" --images "$pairs" --output "$out/evaluation"

echo "5/6  The checkpoint, which points to the model that it began from, becomes a whole model:"
deltavlm export "$out/checkpoint" "$out/model"

echo "6/6  What would go to the Hub, with the card; without --dry-run it goes:"
deltavlm publish "$out/model" "$repo" --report "$out/evaluation/report.json" --license "$license" --dry-run
