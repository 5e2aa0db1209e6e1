"""Evaluate an encoder on gold word alignments or on sentence retrieval: one JSON object on standard output.

    python -m training.evaluate alignment --model M --gold FILE --method softmax|mutual|itermax|ot [--layer L]
    python -m training.evaluate retrieval --model M --pairs FILE [--layer L]

The layer and the settings of the extraction are by default what the model's own card (`otkern` in its config.json)
names as best for the task. `--set name=value` changes a setting.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence

import torch

from training import cli, encoder, extract
from training.data import GoldPair, read_gold, read_pairs, split_words
from training.metrics import alignment_scores, anisotropy, retrieval_accuracy

RETRIEVAL_DEFAULTS = {"center": True, "csls_neighbours": 0}


def default_layer(model, task: str) -> int:
    """Return the layer that the model's card names as best for `alignment` or `retrieval`; without a card the one at
    two thirds of the depth, which is where multilingual encoders align best."""
    layer = encoder.card_settings(model).get(f"{task}_layer")
    return round(encoder.number_of_layers(model) * 2 / 3) if layer is None else encoder.check_layer(layer, model)


def alignment_settings(model, overrides: dict | None = None) -> dict:
    """Return the extraction settings of the model's card, completed with the defaults, changed by `overrides`."""
    return extract.complete(encoder.card_settings(model).get("alignment", {}) | (overrides or {}))


def retrieval_settings(model, overrides: dict | None = None) -> dict:
    """Return the retrieval settings of the model's card, completed with the defaults, changed by `overrides`."""
    return complete_retrieval(encoder.card_settings(model).get("retrieval", {}) | (overrides or {}))


def complete_retrieval(settings: dict) -> dict:
    """Return retrieval settings with the defaults filled in.

    Raises:
        ValueError: a name or value that retrieval does not know.
    """
    if unknown := set(settings) - set(RETRIEVAL_DEFAULTS):
        raise ValueError(f"retrieval settings must be among {sorted(RETRIEVAL_DEFAULTS)}, but had {sorted(unknown)}")
    settings = RETRIEVAL_DEFAULTS | settings
    neighbours = settings["csls_neighbours"]
    if not isinstance(settings["center"], bool):
        raise ValueError(f"center must be true or false, but was {settings['center']!r}")
    if not isinstance(neighbours, int) or isinstance(neighbours, bool) or neighbours < 0:
        raise ValueError(f"csls_neighbours must be a whole number of at least 0, but was {neighbours!r}")
    return settings


def evaluate_alignment(
    model, tokenizer, pairs: Sequence[GoldPair], methods: Sequence[str], layers: Sequence[int], settings: dict
) -> dict[str, dict[int, dict[str, float]]]:
    """Score extraction methods at several layers against gold links.

    Args:
        model: the encoder.
        tokenizer: its tokenizer.
        pairs: gold pairs.
        methods: among `extract.METHODS`.
        layers: layers from 0.
        settings: completed extraction settings.

    Returns:
        {method: {layer: {`aer`, `precision`, `recall`, `f1`}}}.
    """
    encoded = extract.GoldEncoder(model, tokenizer, pairs, layers, settings)
    sure, possible = [pair.sure for pair in pairs], [pair.possible for pair in pairs]
    return {
        method: {layer: alignment_scores(encoded.links(method, layer), sure, possible) for layer in layers}
        for method in methods
    }


def encode_sentences(model, tokenizer, texts: Sequence[str], layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Mean-pooled vectors of raw sentences: {layer: (N, D)}, in the order given."""
    sentences = encoder.tokenize(tokenizer, [split_words(text) for text in texts])
    vectors = encoder.encode(model, sentences, layers, tokenizer.pad_token_id, encoder.sentence_vectors)
    return {layer: torch.stack(vectors[layer]) for layer in layers}


def evaluate_retrieval(
    model,
    tokenizer,
    pairs: Sequence[tuple[str, str]],
    layers: Sequence[int],
    settings: dict,
    cache: dict | None = None,
) -> dict[int, dict[str, float]]:
    """Top-1 sentence retrieval by cosine of mean-pooled vectors, both ways.

    Args:
        model: the encoder.
        tokenizer: its tokenizer.
        pairs: (English, other) sentences.
        layers: layers from 0.
        settings: `center`: subtract each side's mean first; `csls_neighbours`: 0 or the k of CSLS.
        cache: keeps the vectors of each list of sentences of this model, for sets that share their English side.

    Returns:
        {layer: {`accuracy`, `accuracy_forward` (English to other), `accuracy_backward`}}.
    """
    cache = {} if cache is None else cache
    sides, scores = [], {}
    for texts in zip(*pairs, strict=True):
        if texts not in cache:
            cache[texts] = encode_sentences(model, tokenizer, texts, layers)
        sides.append(cache[texts])
    for layer in layers:
        english, other = (side[layer] - side[layer].mean(0) if settings["center"] else side[layer] for side in sides)
        scores[layer] = retrieval_accuracy(english, other, settings["csls_neighbours"])
    return scores


def evaluate_anisotropy(model, tokenizer, texts: Sequence[str], layers: Sequence[int], sample: int = 4000) -> dict:
    """Mean cosine of random word pairs at each layer: {layer: −1…1}, over `sample` words drawn with a fixed seed.

    Texts with fewer than two words have no pairs: {}.
    """
    sentences = encoder.tokenize(tokenizer, [split_words(text) for text in texts])
    gather = lambda hidden, tokens: encoder.word_vectors(hidden, tokens, "mean")  # noqa: E731
    vectors = encoder.encode(model, sentences, layers, tokenizer.pad_token_id, gather)
    scores = {}
    for layer in layers:
        words = torch.cat(vectors[layer])
        if len(words) < 2:
            return {}
        order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))[:sample]
        scores[layer] = anisotropy(words[order])
    return scores


def parse_settings(items: Sequence[str]) -> dict:
    """Read `name=value` items, values in YAML.

    Raises:
        ValueError: an item without `=`.
    """
    settings = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"--set must be name=value, but was {item!r}")
        settings[name] = cli.read_yaml(value, f"--set {name}")
    return settings


def build_parser() -> argparse.ArgumentParser:
    """Command line of `python -m training.evaluate`."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.split("\n")[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    alignment = tasks.add_parser("alignment", help="word links against gold links")
    alignment.add_argument("--gold", required=True, help="English tokens, other tokens, links (i-j sure, i?j possible)")
    alignment.add_argument("--method", choices=extract.METHODS, default="ot")
    retrieval = tasks.add_parser("retrieval", help="top-1 sentence retrieval, both ways")
    retrieval.add_argument("--pairs", required=True, help="english<TAB>other[.gz], JSON lines, parquet or a hub name")
    retrieval.add_argument("--language", help="language code, where the file has a column for each language")
    retrieval.add_argument("--limit", type=int, help="use only the first pairs")
    for task in (alignment, retrieval):
        task.add_argument("--model", required=True, help="folder or hub name of any AutoModel")
        task.add_argument("--layer", type=int, help="default: the best for this task according to the model's card")
        task.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings other than the card's")
    return parser


def run(arguments: argparse.Namespace) -> dict:
    """Carry out the task of a parsed command line and return what is to be printed."""
    model, tokenizer = encoder.load_encoder(arguments.model)
    overrides = parse_settings(arguments.set)
    if arguments.layer is None:
        layer = default_layer(model, arguments.task)
    else:
        layer = encoder.check_layer(arguments.layer, model)
    if arguments.task == "alignment":
        pairs, settings = read_gold(arguments.gold), alignment_settings(model, overrides)
        details = {"method": arguments.method, "gold": arguments.gold}
    else:
        pairs = read_pairs(arguments.pairs, arguments.language)[: arguments.limit]
        settings, details = retrieval_settings(model, overrides), {"pairs": arguments.pairs}
    if not pairs:
        raise ValueError(f"{arguments.task} needs at least one pair, but the file has none")
    if arguments.task == "alignment":
        method = arguments.method
        scores = evaluate_alignment(model, tokenizer, pairs, [method], [layer], settings)[method][layer]
    else:
        scores = evaluate_retrieval(model, tokenizer, pairs, [layer], settings)[layer]
    return scores | details | {"n_pairs": len(pairs), "model": arguments.model, "layer": layer, "settings": settings}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: whatever libraries print goes to standard error, the result alone to standard output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = build_parser().parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):
        result = run(arguments)
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    cli.run(main)
