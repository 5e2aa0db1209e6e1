"""Tune an encoder so that words and their translations meet: the alignment run from files to report and pictures.

    python -m training.align --config training/configs/sample.yaml --output_dir DIR [--seed N] [key.subkey=value ...]

It measures the initial model, tunes it with the alignment loss stage by stage, measures again, and leaves in DIR:
`model/` (the tuned encoder, its tokenizer and card), `report.json`, pictures, and `checkpoints/` to resume from.
"""

import argparse
import copy
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
import yaml

import otkern
from training import card, cli, encoder, measure, plots
from training.config import load_config
from training.data import read_pairs, split_words
from training.extract import complete
from training.splits import is_held_out, normalise_english
from training.trainer import AlignmentTrainer, Corpus, Steps


def training_pairs(config: dict, language: str, forbidden: set[str], limit: int | None) -> list[tuple[str, str]]:
    """Read one language's training pairs, without held-out or evaluated English sentences.

    Args:
        config: complete configuration.
        language: code of the other language.
        forbidden: normalised English sentences that are evaluated on.
        limit: how many pairs to return at most; None: all.

    Returns:
        (English, other) sentences in file order; when `limit` asks for fewer, the first allowed ones of a fixed order.

    Raises:
        ValueError: nothing is left.
    """
    train = config["train"]
    source = {key: train[key] for key in ("name", "split", "columns")}
    pairs = list(dict.fromkeys(read_pairs(train["source"], language, **source)))
    kept = []
    for row in torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist():
        if len(kept) == limit:
            break
        english = pairs[row][0]
        short = all(0 < len(split_words(side)) <= train["max_words"] for side in pairs[row])
        if short and not is_held_out(english) and normalise_english(english) not in forbidden:
            kept.append(row)
    if not kept:
        raise ValueError(
            f"train.source must give pairs for {language!r} beside those held out, evaluated on or kept back by "
            f"dev_pairs = {config['dev_pairs']}, but none of its {len(pairs)} pairs were left"
        )
    return [pairs[row] for row in sorted(kept)]


def choose_dev_pairs(config: dict, language: str, forbidden: set[str]) -> list[tuple[str, str]]:
    """Choose one language's `dev_pairs`: at random, but the same in every run, so that a resumed one agrees."""
    limit = config["train"]["limit"]
    pairs = training_pairs(config, language, forbidden, limit + config["dev_pairs"] if limit else None)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1)).tolist()
    return [pairs[row] for row in order[: config["dev_pairs"]]]


def read_training_text(config: dict, sets: measure.TestSets, tokenizer) -> list[Corpus]:
    """Read and tokenise the training text of all languages; `dev_pairs` of each go to `sets.dev_retrieval` instead.

    No language trains on an English sentence that is among the development pairs of any language.
    """
    forbidden = {normalise_english(text) for text in sets.english()}
    if config["dev_pairs"]:
        for language in config["languages"]:
            sets.dev_retrieval[language] = choose_dev_pairs(config, language, forbidden)
        # A sentence can have several translations, and languages share sentences: without this, training would see
        # some of them. The text is read again below, so that other pairs come up to `train.limit` in their place.
        forbidden |= {normalise_english(english) for pairs in sets.dev_retrieval.values() for english, _ in pairs}
    corpora, max_length = [], config["train"]["max_length"]
    for language in config["languages"]:
        pairs = training_pairs(config, language, forbidden, config["train"]["limit"] or None)
        english, other = ([split_words(pair[side]) for pair in pairs] for side in (0, 1))
        tokenized = [encoder.tokenize(tokenizer, side, max_length) for side in (other, english)]
        # A side without any subword has no points: no mass could be moved, and the loss would be infinite.
        rows = [row for row, sides in enumerate(zip(*tokenized, strict=True)) if all(side.kept for side in sides)]
        if not rows:
            raise ValueError(f"train.source gives pairs for {language!r}, but in none of them both sides have subwords")
        corpora.append(Corpus(language, *([side[row] for row in rows] for side in tokenized)))
    return corpora


def number_layers(stages: Sequence[dict], model) -> list[dict]:
    """Return the stages with every layer numbered from 0."""
    stages = copy.deepcopy(list(stages))
    for s, stage in enumerate(stages):
        stage["layers"] = [encoder.check_layer(layer, model, f"stages.{s}.layers") for layer in stage["layers"]]
        if stage["plan_layer"] is not None:
            stage["plan_layer"] = encoder.check_layer(stage["plan_layer"], model, f"stages.{s}.plan_layer")
        sentence = stage["sentence_contrast"]
        sentence["layer"] = encoder.check_layer(sentence["layer"], model, f"stages.{s}.sentence_contrast.layer")
    return stages


def find_checkpoint(folder: Path, resume: str) -> str | None:
    """Return the checkpoint to go on from.

    Args:
        folder: where the run keeps its checkpoints.
        resume: `auto`: the last one there, if any; `never`: none; else a checkpoint's path.
    """
    if resume == "never":
        return None
    if resume != "auto":
        if not Path(resume).is_dir():
            raise ValueError(f"--resume must be auto, never or a checkpoint folder, but was {resume!r}")
        return resume
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def check_output(output: Path, config: dict, resume: str) -> None:
    """Refuse an output folder that holds checkpoints, a model or a report of another configuration."""
    record = output / "config.yaml"
    # Nothing else there took long to make: a run stopped before its first checkpoint leaves only its configuration.
    results = [*output.glob("checkpoints/checkpoint-*"), output / "model", output / "report.json"]
    results = [path for path in results if path.exists()]
    find_checkpoint(output / "checkpoints", resume)  # says so where `resume` names no folder
    if resume != "never" and results and not (record.exists() and cli.read_yaml_file(record) == config):
        raise ValueError(
            f"--output_dir must hold no results but those of a run with this configuration, but {results[0]} exists "
            f"and {record} {'differs' if record.exists() else 'is missing'}; "
            "choose another folder, or pass --resume never to start over in it"
        )


def claim_output(output: Path, config: dict, resume: str) -> None:
    """Make the output folder with a record of the configuration; see `check_output`."""
    check_output(output, config, resume)
    if resume == "never":
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    record = output / "config.yaml"
    record.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


def build_trainer(config: dict, output: Path, model, steps: Steps, stages: list[dict]) -> AlignmentTrainer:
    """Set up the trainer for all stages together."""
    logging_steps = min(config["logging_steps"], max(1, len(steps) // 4))
    arguments = transformers.TrainingArguments(
        output_dir=str(output / "checkpoints"),
        per_device_train_batch_size=1,
        max_steps=len(steps),
        seed=config["seed"],
        max_grad_norm=config["max_grad_norm"],
        logging_steps=logging_steps,
        logging_first_step=True,
        # A log averages since the last one; saving only after a log keeps the resumed log exact, too.
        save_steps=max(1, round(config["save_steps"] / logging_steps)) * logging_steps,
        save_total_limit=2,
        report_to=[],
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        use_cpu=config["device"] == "cpu",
        ddp_find_unused_parameters=True,
    )
    return AlignmentTrainer(
        model=model,
        args=arguments,
        reference=copy.deepcopy(model),
        steps=steps,
        stages=stages,
        bf16=encoder.use_bf16(config["precision"], arguments.device),
        betas=config["adam_betas"],
    )


def versions() -> dict[str, str]:
    """Versions of everything that has a say in the numbers."""
    modules = {"otkern": otkern, "torch": torch, "transformers": transformers}
    found = {name: getattr(module, "__version__", "unknown") for name, module in modules.items()}
    return found | {"python": platform.python_version(), "machine": platform.machine()}


def run(config: dict, output: Path, resume: str = "auto") -> dict:
    """Carry out an alignment run.

    Args:
        config: complete configuration.
        output: folder for everything it leaves.
        resume: see `find_checkpoint`.

    Returns:
        The report, as written to `output/report.json`.
    """
    times, start = {}, time.monotonic()

    def lap(name: str) -> None:
        nonlocal start
        times[name] = round(time.monotonic() - start, 2)
        start = time.monotonic()
        print(f"{name}: {times[name]} s", file=sys.stderr, flush=True)

    check_output(output, config, resume)
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    transformers.set_seed(config["seed"])
    model, tokenizer = encoder.load_encoder(config["model"])
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(model.config, name):
            setattr(model.config, name, config["dropout"])
    _set_dropout(model, config["dropout"])
    stages = number_layers(config["stages"], model)
    measure.check_layers(model, config)
    sets = measure.read_test_sets(config)
    corpora = read_training_text(config, sets, tokenizer)
    # Only now: what is wrong with the configuration or its files has been said by then.
    claim_output(output, config, resume)
    lap("reading")
    methods = config["evaluation"]["methods"]
    before = measure.measure(model, tokenizer, sets, config, methods)
    layers_before = measure.initial_layers(model, before, config)
    samples = plots.heat_map_samples(sets, config)
    maps_before = plots.heat_maps(model, tokenizer, samples, layers_before["alignment"], config)
    lap("measuring before")

    steps = Steps(corpora, stages, config["batch_pairs"], config["seed"], tokenizer.pad_token_id)
    trainer = build_trainer(config, output, model, steps, stages)
    trainer.train(resume_from_checkpoint=find_checkpoint(output / "checkpoints", resume))
    lap("training")

    model.eval().requires_grad_(True).to("cpu")
    after = measure.measure(model, tokenizer, sets, config, methods)
    layers_after = measure.choose_layers(after, model, config)
    maps_after = plots.heat_maps(model, tokenizer, samples, layers_after["alignment"], config)
    lap("measuring after")

    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    report = {
        "initial_model": config["model"],
        "seed": config["seed"],
        "layers": {"before": layers_before, "after": layers_after},
        "metrics": {
            "before": measure.at_layers(before, layers_before),
            "after": measure.at_layers(after, layers_after),
        },
        "by_layer": {"before": before, "after": after},
        "training": {
            "pairs": {corpus.language: len(corpus.english) for corpus in corpora},
            "steps": len(steps),
            "stage_steps": steps.stage_steps,
            "precision": "bf16" if trainer.bf16 else "fp32",
            "log": log,
        },
        "config": config,
        "versions": versions(),
    }
    model.config.otkern = {
        "alignment_layer": layers_after["alignment"],
        "retrieval_layer": layers_after["retrieval"],
        "alignment": complete(config["evaluation"]["alignment_settings"]),
    }
    card.save_model(model, tokenizer, output / "model", report)
    plots.draw(report, samples, maps_before, maps_after, output)
    lap("saving and drawing")
    report["times"] = times
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (output / "report.json").write_text(text + "\n", encoding="utf-8")
    return report


def _set_dropout(model, probability: float) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m training.align`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(prog="python -m training.align", description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="YAML file; training/configs holds two")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, help="instead of the configuration's")
    parser.add_argument("--resume", default="auto", help="auto (default): from the last checkpoint; never; or a folder")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as stages.0.reg=0.1")
    arguments = parser.parse_intermixed_args(argv)
    seed = [] if arguments.seed is None else [f"seed={arguments.seed}"]
    config = load_config(arguments.config, [*arguments.overrides, *seed])
    report = run(config, Path(arguments.output_dir), arguments.resume)
    print(card.summary(report))


if __name__ == "__main__":
    cli.run(main)
