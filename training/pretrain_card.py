"""Measure the pretrained encoder by layer, choose its layers on development data, and write model and card.

    OTKERN_DATA=... python -m training.pretrain_card --config training/configs/pretrain.yaml --run DIR \
        --output_dir training/models/mini

DIR is the output folder of `training.pretrain`. Every number of the card comes from this command or from the run's
pretrain_metrics.json. The golden collection and NTREX are reported and never used to choose anything.
"""

import argparse
import json
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import AutoModelForMaskedLM, AutoTokenizer, set_seed

from training import cli, evaluate, extract
from training.data import read_gold, read_pairs
from training.pretrain import build_model, data_folder, export, read_config
from training.splits import held_out_pairs

METHODS = ("ot", "mutual")
DEV_GOLD = {"es": "gold/xlwa-dev.en-es.tsv.gz", "bg": "gold/xlwa-dev.en-bg.tsv.gz"}
TEST_GOLD = {"es": "gold/golden-collection.en-es.tsv.gz", "fr": "gold/golden-collection.en-fr.tsv.gz"}


def measure(model, tokenizer, folder: Path, languages: list[str]) -> dict:
    """Score an encoder at every layer with the tools' default settings.

    Args:
        model: the encoder.
        tokenizer: its tokenizer.
        folder: the data folder.
        languages: codes of the languages whose sentences are retrieved.

    Returns:
        `alignment` {(set, language, method): [AER of each layer]}, `retrieval` {(set, language): [top-1 accuracy of
        each layer]}, both 0…1; the sets "dev" choose the layers.
    """
    layers = range(model.config.num_hidden_layers + 1)
    alignment, retrieval = {}, {}
    for name, files in (("dev", DEV_GOLD), ("golden collection", TEST_GOLD)):
        for language, file in files.items():
            gold = read_gold(str(folder / file))
            scores = evaluate.evaluate_alignment(model, tokenizer, gold, METHODS, layers, extract.complete({}))
            for method in METHODS:
                alignment[name, language, method] = [scores[method][layer]["aer"] for layer in layers]
    for language in languages:
        tatoeba = read_pairs(str(folder / f"parallel/train/tatoeba.en-{language}.tsv.gz"), language)
        ntrex = read_pairs(str(folder / f"parallel/dev/ntrex.en-{language}.tsv.gz"), language)
        for name, pairs in (("dev", held_out_pairs(tatoeba)), ("NTREX", ntrex[:1000])):
            scores = evaluate.evaluate_retrieval(model, tokenizer, pairs, layers, evaluate.RETRIEVAL_DEFAULTS)
            retrieval[name, language] = [scores[layer]["accuracy"] for layer in layers]
    return {"alignment": alignment, "retrieval": retrieval}


def choose_layers(scores: dict) -> dict[str, int]:
    """Return the layers that are best on the development sets, as the keys `otkern` of config.json.

    Args:
        scores: result of `measure`.

    Returns:
        `alignment_layer`, lowest mean AER of the first method; `retrieval_layer`, highest mean accuracy.
    """
    aers = [values for key, values in scores["alignment"].items() if key[0] == "dev" and key[2] == METHODS[0]]
    accuracies = [values for key, values in scores["retrieval"].items() if key[0] == "dev"]
    layers = range(len(aers[0]))
    return {
        "alignment_layer": min(layers, key=lambda layer: sum(values[layer] for values in aers)),
        "retrieval_layer": max(layers, key=lambda layer: sum(values[layer] for values in accuracies)),
    }


def table(trained: dict, untrained: dict, names: dict[str, str]) -> str:
    """Return a table in per cent: a row a set, trained / untrained in a column a layer."""
    layers = range(len(next(iter(trained.values()))))
    lines = ["| | " + " | ".join(f"layer {layer}" for layer in layers) + " |", "|---|" + "---|" * len(layers)]
    for key, values in trained.items():
        cells = [f"{100 * a:.1f} / {100 * b:.1f}" for a, b in zip(values, untrained[key], strict=True)]
        title = ", ".join([names[key[0]], f"en-{key[1]}", *key[2:]])
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def card(config: dict, metrics: dict, layers: dict[str, int], trained: dict, untrained: dict) -> str:
    """Return the text of the model card.

    Args:
        config: the configuration of the run.
        metrics: the run's pretrain_metrics.json.
        layers: result of `choose_layers`.
        trained, untrained: results of `measure` for this encoder and for its random start.
    """
    front = {
        "language": ["en", *config["languages"]],
        "license": "cc-by-2.0",
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["word-alignment", "multilingual", "masked-lm", "translation-language-modelling"],
    }
    heads, width = config["num_attention_heads"], config["hidden_size"]
    alignment_names = {"dev": "XL-WA dev", "golden collection": "golden collection"}
    retrieval_names = {"dev": "held-out Tatoeba", "NTREX": "NTREX, first 1000"}

    def passes(corpus: str) -> str:
        copies = config["copies"][corpus]
        counts = {"all": "", **{language: f" ({language})" for language in copies if language != "all"}}
        return ", ".join(f"{copies[name] * metrics['epochs']:.2g}{note}" for name, note in counts.items())

    losses = "\n".join(
        f"| held-out Tatoeba, {title} | {metrics['held_out_untrained'][kind]:.2f} | {metrics['held_out'][kind]:.2f} |"
        for kind, title in (("single", "sentences alone"), ("pair", "with their translation"))
    )
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---
# A small multilingual encoder for alignment experiments

A BERT of {config["num_hidden_layers"]} blocks, width {width}, {heads} heads, and {config["vocab_size"]} lower-cased
BPE pieces shared by six languages: {metrics["parameters"] / 1e6:.2f} million parameters, stored in fp16, run in fp32.
It exists so that the alignment run can be tried from a fresh checkout without any download. It is **not** a general
encoder: it has read little text, much of it biblical and old-fashioned.

## Use
```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("training/models/mini")
model = AutoModel.from_pretrained("training/models/mini", add_pooling_layer=False).float()
```
At most {config["max_position_embeddings"]} pieces a sentence. `config.json` names under `otkern` the layers that the
tools use: **{layers["alignment_layer"]} for word alignment, {layers["retrieval_layer"]} for sentence retrieval**
(0 is the embedding layer, k the output of block k), chosen on development data: the lowest mean AER of the transport
plan on XL-WA dev en-es and en-bg, the highest mean accuracy on held-out Tatoeba pairs.

## Text
| source | languages, each with English | times each pair was read | licence |
|---|---|---|---|
| Bible translations, joined by verse | bg, de, el, es, fr | {passes("bible")} | public domain |
| [Tatoeba](https://tatoeba.org) pairs | bg, de, el, es, fr | {passes("tatoeba")} | CC BY 2.0 FR, its contributors |
| [TICO-19](https://tico-19.github.io) | es, fr | {passes("tico19")} | CC0 |

The weights are published under CC BY 2.0, with attribution to the contributors of Tatoeba. Pairs whose English side
belongs to the held-out ninth (`training/splits.py`) were dropped from all three sources.

## Training
```
OTKERN_DATA=... python -m training.pretrain --config training/configs/pretrain.yaml --output_dir DIR
OTKERN_DATA=... python -m training.pretrain_card --config training/configs/pretrain.yaml --run DIR \\
    --output_dir training/models/mini
```
Masked-language modelling on single sentences and on translation pairs (positions restart at the second sentence),
whole words masked. {metrics["steps"]} steps of up to {config["tokens_per_batch"]} tokens,
{metrics["tokens"] / 1e6:.1f} million tokens without padding, {metrics["epochs"]:.2f} epochs, in
{metrics["seconds"] / 60:.0f} minutes on {config["threads"]} x86 CPU cores that other programs used as well. One seed.

| masked-LM loss, nats per predicted piece | start | end |
|---|---|---|
| training, first and last {config["logging_steps"]} steps | {metrics["loss_first"]:.2f} | {metrics["loss_last"]:.2f} |
{losses}

## Scores by layer, before any tuning
Each cell: this encoder / the same network untrained (random start, same tokenizer).

AER in per cent, lower is better; `ot` is the transport plan with the tools' default settings, among them a mild
preference for the diagonal, `mutual` is mutual argmax of cosines without any such preference.

{table(trained["alignment"], untrained["alignment"], alignment_names)}

Sentence retrieval among 1000: top-1 accuracy in per cent of mean-pooled, centred vectors by cosine, mean of both
directions. An untrained embedding layer is above chance because names and numbers are spelt alike.

{table(trained["retrieval"], untrained["retrieval"], retrieval_names)}
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, write model and card, print the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True, help="output folder of training.pretrain")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder = data_folder()
    config = read_config(arguments.config)
    metrics_path = arguments.run / "pretrain_metrics.json"
    if not metrics_path.exists():
        raise ValueError(
            f"--run must be a finished run of training.pretrain, but {shlex.quote(str(metrics_path))} is missing"
        )
    metrics = json.loads(metrics_path.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.run)
    model = AutoModelForMaskedLM.from_pretrained(arguments.run).float().eval()
    set_seed(config["seed"])
    start = build_model(config, len(tokenizer)).eval()
    trained, untrained = (measure(net.bert, tokenizer, folder, config["languages"]) for net in (model, start))
    layers = choose_layers(trained)
    model.config.otkern = layers
    export(model, arguments.output_dir)
    # Copied, because measuring leaves its truncation length in a loaded tokenizer.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(arguments.run / name, arguments.output_dir / name)
    text = card(config, metrics, layers, trained, untrained)
    (arguments.output_dir / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    cli.run(main)
