"""The configuration of an alignment run: defaults, YAML files, dotted overrides, and checks of every name and value."""

import copy
import math
import re

from training import extract
from training.cli import read_yaml, read_yaml_file
from training.data import resolve_path
from training.encoder import UNITS, WORD_VECTORS
from training.evaluate import complete_retrieval
from training.loss import RELAXATIONS

# One stage of the curriculum. Lists of stages in a file are completed with these values.
STAGE = {
    "name": "stage",
    "epochs": 1.0,
    "learning_rate": 5e-5,
    "warmup": 0.1,
    # Where the points come from. Layers are numbered from 0, the embedding layer; negative ones count from the end.
    "layers": [-1],
    "plan_layer": None,
    "unit": "word",
    "word_vector": "last",
    "special_tokens": "drop",
    "scope": "sentence",
    "center": False,
    # The transport problem.
    "metric": "cosine",
    "reg": 0.05,
    "max_iter": 20,
    "tol": None,
    # What becomes of the marginals, and its number: rho of `unbalanced`, mass of `partial`, price of `null_points`.
    "relaxation": "balanced",
    "relaxation_value": None,
    "debias": True,
    "position_prior": [0.0, 0.0],
    # The weights of the loss's parts.
    "ot_weight": 1.0,
    "target_gradient": "live",
    "contrast": {"weight": 0.0, "temperature": 0.1},
    "sentence_contrast": {"weight": 0.0, "temperature": 0.05, "layer": -1},
    "spread": 0.0,
    "regulariser": 1.0,
    "reg_reduction": "token_mean",
    # Regular expressions of parameter names; None: all parameters are tuned.
    "trainable": None,
}

DEFAULTS = {
    "model": None,
    "languages": ["de", "fr", "es", "el", "bg"],
    "seed": 1,
    "threads": None,
    "device": "auto",
    "precision": "auto",
    "train": {
        "source": None,
        "name": None,
        "split": "train",
        "columns": None,
        "limit": None,
        "max_words": 64,
        "max_length": 96,
    },
    # Pairs of the training source kept back to choose layers on, a language.
    "dev_pairs": 0,
    "batch_pairs": 32,
    "dropout": 0.0,
    "max_grad_norm": 1.0,
    "adam_betas": [0.9, 0.98],
    "logging_steps": 10,
    "save_steps": 200,
    "stages": [],
    "evaluation": {
        # {name: {language: file}} or {name: pattern with {lang}}.
        "alignment": {},
        "dev_alignment": {},
        "retrieval": {},
        "methods": ["ot", "mutual", "itermax", "softmax"],
        # A number, or `auto`: the best on the development sets after tuning.
        "alignment_layer": "auto",
        "retrieval_layer": "auto",
        "alignment_settings": {},
        "retrieval_settings": {},
        "heat_maps": 2,
    },
}

CHOICES = {
    "unit": UNITS,
    "word_vector": WORD_VECTORS,
    "special_tokens": ("drop", "keep"),
    "scope": ("sentence", "batch"),
    "metric": ("cosine", "dot", "sqeuclidean", "euclidean"),
    "relaxation": tuple(RELAXATIONS),
    "target_gradient": ("live", "detach"),
    "reg_reduction": ("token_mean", "sum", "element_mean"),
}
# Every numeric key: whether it must be whole, its least value ("above": any above 0), the value it must stay below,
# whether it may be null.
_COUNT, _WEIGHT, _POSITIVE = (True, 0, math.inf, False), (False, 0, math.inf, False), (False, "above", math.inf, False)
_SHARE, _SOME = (False, 0, 1, False), (True, 1, math.inf, False)
STAGE_NUMBERS = {
    "epochs": _POSITIVE,
    "learning_rate": _POSITIVE,
    "warmup": _SHARE,
    "layers": (True, -math.inf, math.inf, False),
    "plan_layer": (True, -math.inf, math.inf, True),
    "reg": _POSITIVE,
    "max_iter": _SOME,
    "tol": (False, 0, math.inf, True),
    "position_prior": _WEIGHT,
    "ot_weight": _WEIGHT,
    "contrast.weight": _WEIGHT,
    "contrast.temperature": _POSITIVE,
    "sentence_contrast.weight": _WEIGHT,
    "sentence_contrast.temperature": _POSITIVE,
    "sentence_contrast.layer": (True, -math.inf, math.inf, False),
    "spread": _WEIGHT,
    "regulariser": _WEIGHT,
}
NUMBERS = {
    "seed": _COUNT,
    "threads": (True, 1, math.inf, True),
    "train.limit": (True, 0, math.inf, True),
    "train.max_words": _SOME,
    "train.max_length": (True, 3, math.inf, False),
    "dev_pairs": _COUNT,
    "batch_pairs": _SOME,
    "dropout": _SHARE,
    "max_grad_norm": _WEIGHT,
    "adam_betas": _SHARE,
    "logging_steps": _SOME,
    "save_steps": _SOME,
    "evaluation.heat_maps": _COUNT,
}
# Of a fixed length; `layers` may have any but none.
PAIRS = ("position_prior", "adam_betas")
OPEN = ("alignment", "dev_alignment", "retrieval", "alignment_settings", "retrieval_settings")


def load_config(path: str | None, overrides: list[str] = ()) -> dict:
    """Read a configuration file, complete it and apply overrides.

    Args:
        path: YAML file; None: the defaults alone.
        overrides: `key.subkey=value` items, values in YAML; a number indexes a list, `stages.0.reg=0.1`.

    Returns:
        A complete, checked configuration of plain dicts and lists.

    Raises:
        ValueError: an unknown key, a value that is not among the choices, or a missing one.
    """
    given = read_yaml_file(resolve_path(path)) if path else {}
    config = _complete(given or {})
    for item in overrides:
        name, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"an override must be key=value, but was {item!r}")
        _assign(config, name.lstrip("-").split("."), read_yaml(value, name), name)
        # An override may have put something else in the place of a mapping or of the list of stages.
        config = _complete(config)
    check(config)
    return config


def _complete(given: dict) -> dict:
    """Return `given` with the defaults of the configuration and of each stage."""
    config = merge(DEFAULTS, given, "")
    if not isinstance(config["stages"], list):
        raise ValueError(f"stages must be a list, but was {config['stages']!r}")
    config["stages"] = [merge(STAGE, stage, f"stages.{s}.") for s, stage in enumerate(config["stages"])]
    return config


def merge(defaults: dict, given: dict, prefix: str) -> dict:
    """Return `defaults` with the values of `given`, at every depth; `prefix` names the place in messages."""
    if not isinstance(given, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'config'} must be a mapping, but was {given!r}")
    result = copy.deepcopy(defaults)
    for key, value in given.items():
        if key not in defaults:
            raise ValueError(f"{prefix}{key} is no configuration key; known here: {', '.join(defaults)}")
        if isinstance(defaults[key], dict) and key not in OPEN:
            value = merge(defaults[key], value, f"{prefix}{key}.")
        result[key] = value
    return result


def _assign(config: dict | list, path: list[str], value, name: str) -> None:
    """Set one value deep in the configuration; the place must exist, except in the open mappings."""
    place, parents = config, []
    for key in path[:-1]:
        place = place[_existing(place, key, name)]
        parents.append(key)
    last = path[-1]
    if not (isinstance(place, dict) and parents and parents[-1] in OPEN):
        last = _existing(place, last, name)
    place[last] = value


def _existing(place, key: str, name: str):
    """Return `key` as an index of `place`, a list or a mapping that has it."""
    if isinstance(place, list) and key.lstrip("-").isdigit() and -len(place) <= int(key) < len(place):
        return int(key)
    if isinstance(place, dict) and key in place:
        return key
    known = (
        list(place) if isinstance(place, dict) else f"0 to {len(place) - 1}" if isinstance(place, list) else "nothing"
    )
    raise ValueError(f"override {name} names no configuration key: {key!r} is not among {known}")


def check(config: dict) -> None:
    """Raise ValueError for values that no run could use; see `load_config`."""
    _check_numbers("", config, NUMBERS)
    for s, stage in enumerate(config["stages"]):
        _check_numbers(f"stages.{s}.", stage, STAGE_NUMBERS)
        for key in ("debias", "center"):
            if not isinstance(stage[key], bool):
                raise ValueError(f"stages.{s}.{key} must be true or false, but was {stage[key]!r}")
    _check_evaluation(config["evaluation"])
    _check_text(config)
    for key in ("model", "stages", "languages"):
        if not config[key]:
            raise ValueError(f"{key} must be given, but was {config[key]!r}")
    if not config["train"]["source"]:
        raise ValueError("train.source must name a file or data set, but was empty")
    for s, stage in enumerate(config["stages"]):
        for key, choices in CHOICES.items():
            if stage[key] not in choices:
                raise ValueError(f"stages.{s}.{key} must be one of {choices}, but was {stage[key]!r}")
        check_relaxation(f"stages.{s}.", stage["relaxation"], stage["relaxation_value"], stage["debias"])
        if stage["scope"] == "batch" and any(stage["position_prior"]):
            raise ValueError(
                f"stages.{s}.position_prior must be [0, 0] with scope 'batch', where positions mean nothing"
            )


def _check_text(config: dict) -> None:
    """Raise ValueError for names, or lists of names, that are none; those of the stages included."""
    train, texts = config["train"], {"model": config["model"]}
    texts |= {f"train.{key}": train[key] for key in ("source", "name", "split")}
    for key, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{key} must be text, but was {value!r}")
    lists = {"languages": config["languages"], "train.columns": train["columns"]}
    lists |= {f"stages.{s}.trainable": stage["trainable"] for s, stage in enumerate(config["stages"])}
    for key, value in lists.items():
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise ValueError(f"{key} must be a list of texts, but was {value!r}")
    if train["columns"] is not None and len(train["columns"]) != 2:
        raise ValueError(f"train.columns must be null or two names, but was {train['columns']!r}")
    for s, stage in enumerate(config["stages"]):
        for pattern in stage["trainable"] or []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"stages.{s}.trainable: {pattern!r} is no regular expression ({error})") from None
    for key, choices in (("device", ("auto", "cpu")), ("precision", ("auto", "fp32", "bf16"))):
        if config[key] not in choices:
            raise ValueError(f"{key} must be one of {choices}, but was {config[key]!r}")


def _check_evaluation(evaluation: dict) -> None:
    """Raise ValueError for layers, methods, settings or files of the evaluation that no run could use."""
    for key in ("alignment_layer", "retrieval_layer"):
        layer = evaluation[key] = _as_whole(evaluation[key])
        if layer != "auto" and (not isinstance(layer, int) or isinstance(layer, bool)):
            raise ValueError(f"evaluation.{key} must be auto or a whole number, but was {layer!r}")
    methods = evaluation["methods"]
    if not isinstance(methods, list) or not methods or any(method not in extract.METHODS for method in methods):
        raise ValueError(f"evaluation.methods must be a list of some of {extract.METHODS}, but was {methods!r}")
    for key in OPEN:
        if not isinstance(evaluation[key], dict):
            raise ValueError(f"evaluation.{key} must be a mapping, but was {evaluation[key]!r}")
    for key, complete in (("alignment_settings", extract.complete), ("retrieval_settings", complete_retrieval)):
        try:
            complete(evaluation[key])
        except ValueError as error:
            raise ValueError(f"evaluation.{key}: {error}") from None
    for key in ("alignment", "dev_alignment"):
        for name, files in evaluation[key].items():
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise ValueError(f"evaluation.{key}.{name} must map languages to files, but was {files!r}")
    for name, source in evaluation["retrieval"].items():
        _check_retrieval(f"evaluation.retrieval.{name}", source)


def _check_retrieval(key: str, source) -> None:
    """Raise ValueError for a source of retrieval pairs that `measure.read_test_sets` cannot read."""
    entry = {"source": source} if isinstance(source, str) else source
    if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
        raise ValueError(f"{key} must be a source or a mapping with one, but was {source!r}")
    known = ("source", "held_out", "limit", "languages")
    if unknown := set(entry) - set(known):
        raise ValueError(f"{key} may have the keys {known}, but had {sorted(map(str, unknown))}")
    if entry.get("limit") is not None:
        _check_numbers(f"{key}.", entry, {"limit": _SOME})


def _as_whole(value):
    """A number as a whole one where it is one (1e2 is 100); anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_numbers(prefix: str, place: dict, numbers: dict) -> None:
    """Raise ValueError for a number, or one of a list of numbers, that is none or out of its range.

    Whole numbers in another spelling, such as 1e2, become whole numbers.
    """
    for key, (whole, least, below, optional) in numbers.items():
        *parents, last = key.split(".")
        holder = place
        for name in parents:
            holder = holder[name]
        if whole:
            value = holder[last]
            holder[last] = [_as_whole(number) for number in value] if isinstance(value, list) else _as_whole(value)
        value = holder[last]
        if value is None and optional:
            continue
        values = [value]
        if last in (*PAIRS, "layers"):
            size = 2 if last in PAIRS else "one or more"
            if not isinstance(value, (list, tuple)) or not value or (last in PAIRS and len(value) != 2):
                raise ValueError(f"{prefix}{key} must be a list of {size} numbers, but was {value!r}")
            values = value
        for number in values:
            right = isinstance(number, int if whole else (int, float)) and not isinstance(number, bool)
            inside = right and (number > 0 if least == "above" else least <= number) and number < below
            if not inside:
                bounds = "above 0" if least == "above" else "" if least == -math.inf else f"of at least {least}"
                bounds += "" if below == math.inf else f" and below {below}"
                kind = "a whole number" if whole else "a number"
                raise ValueError(
                    f"{prefix}{key} must be {' '.join(filter(None, (kind, bounds)))}"
                    f"{' or null' if optional else ''}, but was {value!r}"
                )


def check_relaxation(prefix: str, relaxation: str, value: float | None, debias: bool) -> None:
    """Raise ValueError for a relaxation without its number, or one that has no divergence."""
    if relaxation == "balanced":
        if value is not None:
            raise ValueError(f"{prefix}relaxation_value must be null with relaxation 'balanced', but was {value!r}")
        return
    lowest, highest = {"unbalanced": (0, math.inf), "partial": (0, 1), "null_points": (-math.inf, math.inf)}[relaxation]
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not lowest < value <= highest:
        raise ValueError(
            f"{prefix}relaxation_value must be a finite number above {lowest} and up to {highest} with relaxation "
            f"{relaxation!r}, but was {value!r}"
        )
    if debias and relaxation != "unbalanced":
        raise ValueError(f"{prefix}debias must be false with relaxation {relaxation!r}, which has no divergence")
