"""The measurements before and after tuning, by layer, and the choice of the best layers on development data."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from training import evaluate, extract
from training.data import GoldPair, read_gold, read_pairs
from training.encoder import card_settings, check_layer, number_of_layers
from training.splits import held_out_pairs


@dataclass
class TestSets:
    """What a run is measured on.

    Attributes:
        alignment: {set: {language: gold pairs}}, reported.
        dev_alignment: the same, only to choose a layer.
        retrieval: {set: {language: pairs}}, reported.
        dev_retrieval: {language: pairs}, kept back from training, only to choose a layer.
    """

    alignment: dict[str, dict[str, list[GoldPair]]] = field(default_factory=dict)
    dev_alignment: dict[str, dict[str, list[GoldPair]]] = field(default_factory=dict)
    retrieval: dict[str, dict[str, list[tuple[str, str]]]] = field(default_factory=dict)
    dev_retrieval: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def english(self) -> list[str]:
        """Every English sentence of the sets, which no training may see."""
        gold = [*self.alignment.values(), *self.dev_alignment.values()]
        texts = [" ".join(pair.english) for sets in gold for pairs in sets.values() for pair in pairs]
        return texts + [pair[0] for sets in self.retrieval.values() for pairs in sets.values() for pair in pairs]


def read_test_sets(config: dict) -> TestSets:
    """Read the evaluation files that a configuration names.

    Args:
        config: complete configuration. `evaluation.retrieval` maps a name to a source, or to `{source, held_out,
            limit}`: with `held_out` only the held-out split of the source is taken, at most `limit` pairs a language.

    Returns:
        The sets; `dev_retrieval` stays empty, it comes out of the training text.
    """
    evaluation, sets = config["evaluation"], TestSets()
    for kind in ("alignment", "dev_alignment"):
        for name, files in evaluation[kind].items():
            getattr(sets, kind)[name] = {language: read_gold(file) for language, file in files.items()}
    for name, source in evaluation["retrieval"].items():
        entry = source if isinstance(source, dict) else {"source": source}
        sets.retrieval[name] = {}
        for language in entry.get("languages", config["languages"]):
            pairs = read_pairs(entry["source"], language)
            limit = entry.get("limit") or len(pairs)
            sets.retrieval[name][language] = held_out_pairs(pairs, limit) if entry.get("held_out") else pairs[:limit]
    return sets


def measure(model, tokenizer, sets: TestSets, config: dict, methods: Sequence[str]) -> dict:
    """Measure a model on every set, at every layer.

    Args:
        model: the encoder.
        tokenizer: its tokenizer.
        sets: the test sets.
        config: complete configuration; `evaluation.alignment_settings` and `retrieval_settings` count here.
        methods: extraction methods for the reported sets; development sets are measured with the first one.

    Returns:
        `alignment` and `dev_alignment` {set: {language: {method: {layer: scores}}}}, `retrieval` {set: {language:
        {layer: scores}}}, `dev_retrieval` {language: {layer: scores}}, `anisotropy` {layer: value}. Layers are strings,
        as in JSON.
    """
    layers, evaluation = range(number_of_layers(model) + 1), config["evaluation"]
    settings = extract.complete(evaluation["alignment_settings"])
    retrieval_settings = evaluate.RETRIEVAL_DEFAULTS | evaluation["retrieval_settings"]

    def alignment(pairs, chosen) -> dict:
        scores = evaluate.evaluate_alignment(model, tokenizer, pairs, chosen, layers, settings)
        return {method: _strings(by_layer) for method, by_layer in scores.items()}

    cache = {}

    def retrieval(pairs) -> dict:
        return _strings(evaluate.evaluate_retrieval(model, tokenizer, pairs, layers, retrieval_settings, cache))

    def over(tree: dict, function, *arguments) -> dict:
        return {n: {k: function(pairs, *arguments) for k, pairs in by.items()} for n, by in tree.items()}

    texts = [text for by in sets.retrieval.values() for pairs in by.values() for pair in pairs[:100] for text in pair]
    return {
        "alignment": over(sets.alignment, alignment, methods),
        "dev_alignment": over(sets.dev_alignment, alignment, methods[:1]),
        "retrieval": over(sets.retrieval, retrieval),
        "dev_retrieval": {language: retrieval(pairs) for language, pairs in sets.dev_retrieval.items()},
        "anisotropy": _strings(evaluate.evaluate_anisotropy(model, tokenizer, texts, layers)) if texts else {},
    }


def _strings(by_layer: dict) -> dict:
    return {str(layer): value for layer, value in by_layer.items()}


def choose_layers(measured: dict, model, config: dict) -> dict[str, int]:
    """Choose the layer for each task: the one that the configuration gives, else the best on the development sets,
    else what the initial model's card says.

    Args:
        measured: result of `measure`.
        model: the encoder.
        config: complete configuration.

    Returns:
        {`alignment`: layer, `retrieval`: layer}.
    """
    method = config["evaluation"]["methods"][0]
    aers = [by[method] for sets in measured["dev_alignment"].values() for by in sets.values()]
    accuracies = list(measured["dev_retrieval"].values())
    candidates = {
        "alignment": [{layer: -scores["aer"] for layer, scores in by.items()} for by in aers],
        "retrieval": [{layer: scores["accuracy"] for layer, scores in by.items()} for by in accuracies],
    }
    chosen = {}
    for task, tables in candidates.items():
        wanted = config["evaluation"][f"{task}_layer"]
        if wanted != "auto":
            chosen[task] = check_layer(wanted, model, f"evaluation.{task}_layer")
        elif tables:
            chosen[task] = max(range(number_of_layers(model) + 1), key=lambda n: sum(t[str(n)] for t in tables))
        else:
            chosen[task] = evaluate.default_layer(model, task)
    return chosen


def check_layers(model, config: dict) -> None:
    """Raise ValueError if the evaluation's layers are not the model's."""
    for key in ("alignment_layer", "retrieval_layer"):
        if config["evaluation"][key] != "auto":
            check_layer(config["evaluation"][key], model, f"evaluation.{key}")


def initial_layers(model, measured: dict, config: dict) -> dict[str, int]:
    """Layers of the initial model: its card's, else chosen as for the tuned model."""
    card, chosen = card_settings(model), choose_layers(measured, model, config)
    return {task: check_layer(card.get(f"{task}_layer", chosen[task]), model) for task in chosen}


def at_layers(measured: dict, layers: dict[str, int]) -> dict:
    """Pick the reported numbers out of a measurement: each task at its layer, the anisotropy at both and every one."""
    alignment, retrieval = str(layers["alignment"]), str(layers["retrieval"])
    return {
        "alignment": {
            name: {lang: {m: by[alignment] for m, by in methods.items()} for lang, methods in by_language.items()}
            for name, by_language in measured["alignment"].items()
        },
        "retrieval": {
            name: {language: by[retrieval] for language, by in by_language.items()}
            for name, by_language in measured["retrieval"].items()
        },
        "anisotropy": {
            "alignment_layer": measured["anisotropy"].get(alignment),
            "retrieval_layer": measured["anisotropy"].get(retrieval),
            "by_layer": measured["anisotropy"],
        },
    }
