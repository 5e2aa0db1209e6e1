"""The tuned model on disk: weights, tokenizer, and a card that says what it is, how it was made and how it scores."""

from pathlib import Path

import yaml


def save_model(model, tokenizer, folder: Path, report: dict) -> None:
    """Write the model in the Hugging Face format, with its tokenizer and a README.md card.

    Args:
        model: the tuned encoder; `model.config.otkern` names its best layers.
        tokenizer: its tokenizer.
        folder: where to.
        report: the run's report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")


def rows(report: dict) -> list[tuple[str, str, str, float, float]]:
    """Return every reported score as (task, set, language, before, after), alignment as AER with the first method."""
    method = report["config"]["evaluation"]["methods"][0]
    before, after = report["metrics"]["before"], report["metrics"]["after"]
    result = []
    for name, languages in before["alignment"].items():
        for language, by in languages.items():
            scores = by[method]["aer"], after["alignment"][name][language][method]["aer"]
            result.append((f"AER ({method})", name, language, *scores))
    for name, languages in before["retrieval"].items():
        for language, scores in languages.items():
            result.append(
                ("retrieval", name, language, scores["accuracy"], after["retrieval"][name][language]["accuracy"])
            )
    for layer in ("alignment_layer", "retrieval_layer"):
        scores = before["anisotropy"][layer], after["anisotropy"][layer]
        if None not in scores:
            result.append(("mean cosine", layer.replace("_", " "), "all", *scores))
    return result


def summary(report: dict) -> str:
    """Return the scores before and after as a plain table, with means over the languages of each set."""
    lines = [f"{'':<12} {'set':<24} {'lang':<5} {'before':>7} {'after':>7}"]
    groups = {}
    for task, name, language, before, after in rows(report):
        scale = 1 if task == "mean cosine" else 100
        groups.setdefault((task, name), []).append((before * scale, after * scale))
        digits = 2 if scale == 1 else 1
        line = f"{task:<12} {name:<24} {language:<5} {before * scale:7.{digits}f} {after * scale:7.{digits}f}"
        lines.append(line)
    for (task, name), values in groups.items():
        if len(values) > 1:
            means = [sum(column) / len(values) for column in zip(*values, strict=True)]
            lines.append(f"{task:<12} {name:<24} {'mean':<5} {means[0]:7.1f} {means[1]:7.1f}")
    return "\n".join(lines)


def model_card(report: dict) -> str:
    """Return the text of the card: front matter, use, layers, scores, configuration."""
    config, layers = report["config"], report["layers"]["after"]
    table = ["| | set | language | before | after |", "|---|---|---|---|---|"]
    for task, name, language, before, after in rows(report):
        texts = [f"{x:.2f}" if task == "mean cosine" else f"{100 * x:.1f}" for x in (before, after)]
        table.append(f"| {task} | {name} | {language} | {texts[0]} | {texts[1]} |")
    front = {
        "language": ["en", *config["languages"]],
        "library_name": "transformers",
        "tags": ["word-alignment", "optimal-transport"],
        "base_model": config["model"],
    }
    training = {key: config[key] for key in ("train", "batch_pairs", "stages", "seed")}
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}
---
# Encoder tuned for word alignment with otkern

Initial model: `{config["model"]}`. The tuned model keeps its licence and that of the training text,
`{config["train"]["source"]}` ({sum(report["training"]["pairs"].values())} pairs,
{", ".join(config["languages"])} with English). It was tuned by optimal transport between the words of translations
(WordOT, Alqahtani et al. 2021) for {report["training"]["steps"]} steps.

Best layers (0 is the embedding layer): **{layers["alignment"]} for word alignment, {layers["retrieval"]} for sentence
retrieval**; `config.json` carries them under `otkern`, with the settings of the extraction, and
`python -m training.evaluate` uses them.

AER in per cent, lower is better; retrieval is top-1 accuracy in per cent, mean of both directions; the mean cosine of
random word pairs is near 1 for a collapsed model. The initial model is measured at its own best layers
({report["layers"]["before"]["alignment"]} and {report["layers"]["before"]["retrieval"]}).

{chr(10).join(table)}

Measured with one seed. It is a small experiment, not a general-purpose encoder: it knows the languages and the kind
of text that it was trained on.

## Configuration
```yaml
{yaml.safe_dump(training, sort_keys=False, allow_unicode=True).strip()}
```
"""
