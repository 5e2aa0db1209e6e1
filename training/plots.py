"""The pictures of an alignment run: loss curves, plans of sample sentences, scores before and after tuning."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from training import card, extract
from training.data import GoldPair
from training.measure import TestSets

BEFORE, AFTER = "#9aa5b1", "#1f6fb4"
COLLAPSE = 0.65
PARTS = {
    "loss": ("total", "#1b1b1b"),
    "transport": ("transport", "#1f6fb4"),
    "contrast": ("word contrast", "#d1603d"),
    "sentence": ("sentence contrast", "#3a8f5c"),
    "spread": ("spread", "#c2a02f"),
    "regulariser": ("regulariser", "#8a63b0"),
}
LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "cs": "Czech", "de": "German", "el": "Greek", "es": "Spanish", "fr": "French",
    "it": "Italian", "nl": "Dutch", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "tr": "Turkish",
}  # fmt: skip
STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


@dataclass
class Sample:
    """A gold pair to draw: all pairs of its set (they fix the centre of the vectors) and its index among them."""

    name: str
    pairs: list[GoldPair]
    index: int


def heat_map_samples(sets: TestSets, config: dict) -> list[Sample]:
    """Choose sentences to draw: from each language's first gold set those of about ten words with crossing links.

    Args:
        sets: test sets.
        config: complete configuration; `evaluation.heat_maps` gives how many a language.

    Returns:
        The samples, none if there is no gold.
    """
    samples, seen = [], set()
    for by_language in sets.alignment.values():
        for language, pairs in by_language.items():
            if language in seen:
                continue
            seen.add(language)

            def rank(index: int, pairs=pairs) -> tuple:
                pair = pairs[index]
                links = sorted(pair.sure)
                crossings = sum(a[1] > b[1] for a, b in itertools.pairwise(links))
                size = max(len(pair.english), len(pair.other))
                return (not (7 <= size <= 13 and 1 <= crossings <= 3), abs(size - 10), index)

            chosen = sorted(range(len(pairs)), key=rank)[: config["evaluation"]["heat_maps"]]
            samples += [Sample(f"English–{LANGUAGES.get(language, language)}", pairs, index) for index in chosen]
    return samples


def heat_maps(model, tokenizer, samples: list[Sample], layer: int, config: dict) -> list[np.ndarray]:
    """Return the word-by-word transport plan of each sample, rows scaled to 1."""
    settings = extract.complete(config["evaluation"]["alignment_settings"] | {"unit": "word"})
    encoded, plans = {}, []
    for sample in samples:
        if id(sample.pairs) not in encoded:
            encoded[id(sample.pairs)] = extract.GoldEncoder(model, tokenizer, sample.pairs, [layer], settings)
        plans.append(encoded[id(sample.pairs)].plan(layer, sample.index).numpy())
    return plans


def draw(report: dict, samples: list[Sample], before: list, after: list, output: Path) -> None:
    """Write `loss.png`, `scores.png` and, where there is gold, `alignments.png` into `output`."""
    with plt.rc_context(STYLE):
        if report["training"]["log"]:
            _save(draw_loss(report), output / "loss.png")
        if card.rows(report):
            _save(draw_scores(report), output / "scores.png")
        if samples:
            _save(draw_alignments(samples, before, after), output / "alignments.png")


def _save(figure, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def draw_loss(report: dict):
    """The parts of the loss and the anisotropy by step, with the stages told apart."""
    training = report["training"]
    log, stage_steps = training["log"], training["stage_steps"]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7.5, 5.2), sharex=True, height_ratios=[2.2, 1], constrained_layout=True
    )
    steps = [entry["step"] for entry in log]
    marker = "o" if len(steps) < 25 else None
    for name, (label, color) in PARTS.items():
        values = np.array([entry.get(name, np.nan) for entry in log], dtype=float)
        if not np.all(np.isnan(values)) and np.nanmax(np.abs(values)) > 0:
            width = 2.0 if name == "loss" else 1.3
            top.plot(steps, values, color=color, label=label, linewidth=width, marker=marker, markersize=2.5)
    top.set(ylabel="nats and cost units", ylim=(min(0, top.get_ylim()[0]), 1.12 * top.get_ylim()[1]))
    top.set_title("Alignment loss: weighted total and unweighted parts", pad=16)
    top.legend(loc="upper right", ncols=3, fontsize=8)
    bottom.plot(
        steps, [entry["anisotropy"] for entry in log], color="#1b1b1b", linewidth=1.5, marker=marker, markersize=2.5
    )
    bottom.axhline(COLLAPSE, color="#b03030", linewidth=1, linestyle="--")
    bottom.text(0.01, COLLAPSE + 0.02, f"collapse above {COLLAPSE}", color="#b03030", fontsize=8, va="bottom",
                transform=bottom.get_yaxis_transform())  # fmt: skip
    bottom.set(ylim=(-0.05, 1), xlim=(0, sum(stage_steps)), ylabel="mean cosine", xlabel="step")
    bottom.set_title("Random word pairs at the tuned layer")
    start = 0
    for s, (length, stage) in enumerate(zip(stage_steps, report["config"]["stages"], strict=True)):
        for axis in (top, bottom) if s % 2 else ():
            axis.axvspan(start, start + length, color="#f1f3f5", zorder=0)
        top.text(start + length / 2, 1.01, stage["name"], transform=top.get_xaxis_transform(), ha="center", va="bottom",
                 fontsize=8, color="#555555")  # fmt: skip
        start += length
    return figure


def draw_scores(report: dict):
    """Bars of AER and of retrieval accuracy before and after, by set and language: one panel a task."""
    groups = {}
    for task, name, language, before, after in card.rows(report):
        if task != "mean cosine":
            groups.setdefault(task, {}).setdefault(name, []).append((language, 100 * before, 100 * after))
    widths = [max(3.5, sum(len(bars) for bars in sets.values()) + 0.6 * len(sets)) for sets in groups.values()]
    size = (1.6 + 0.62 * sum(widths), 3.6)
    figure, axes = plt.subplots(
        1, len(groups), figsize=size, width_ratios=widths, squeeze=False, constrained_layout=True
    )
    for axis, (task, sets) in zip(axes[0], groups.items(), strict=True):
        _draw_bars(axis, sets)
        method = {"ot": "OT"}.get(m := task.removeprefix("AER (").removesuffix(")"), m)
        axis.set_title(
            "Sentence retrieval, top-1 %" if task == "retrieval" else f"AER %, {method} extraction\n(lower is better)"
        )
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (BEFORE, AFTER)]
    figure.legend(handles, ["before tuning", "after tuning"], loc="outside lower right", ncols=2)
    return figure


def _draw_bars(axis, sets: dict[str, list[tuple[str, float, float]]]) -> None:
    """Draw pairs of bars, grouped by set, with their values and the set's name below."""
    position, ticks, labels = 0.0, [], []
    for name, bars in sets.items():
        first = position
        for language, before, after in bars:
            for offset, value, color in ((-0.2, before, BEFORE), (0.2, after, AFTER)):
                axis.bar(position + offset, value, 0.38, color=color)
                axis.text(position + offset, value, f"{value:.0f}", ha="center", va="bottom", fontsize=7)
            ticks.append(position)
            labels.append(language)
            position += 1
        middle = (first + position - 1) / 2
        axis.text(
            middle,
            -0.13,
            name,
            transform=axis.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=8,
            color="#555555",
        )
        position += 0.6
    axis.set_xticks(ticks, labels)
    axis.tick_params(axis="x", length=0)
    axis.set_ylim(0, 1.12 * max(value for bars in sets.values() for bar in bars for value in bar[1:]) + 1)


def draw_alignments(samples: list[Sample], before: list, after: list):
    """Transport plans of the samples before and after tuning, gold links marked."""
    sizes = [len(sample.pairs[sample.index].english) for sample in samples]
    figure, axes = plt.subplots(
        len(samples),
        2,
        figsize=(9, 0.29 * sum(sizes) + 1.3 * len(samples) + 0.4),
        height_ratios=[s + 3.5 for s in sizes],
        squeeze=False,
        constrained_layout=True,
    )
    for row, (sample, *plans) in enumerate(zip(samples, before, after, strict=True)):
        pair = sample.pairs[sample.index]
        for column, (plan, when) in enumerate(zip(plans, ("before", "after"), strict=True)):
            axis = axes[row][column]
            image = axis.imshow(plan, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for links, marker in ((pair.sure, "s"), (pair.possible - pair.sure, "o")):
                if links:
                    i, j = zip(*sorted(links), strict=True)
                    axis.scatter(j, i, s=62, marker=marker, facecolors="none", edgecolors="#d1603d", linewidths=1.3)
            axis.set_xticks(
                range(len(pair.other)), pair.other, rotation=40, ha="right", rotation_mode="anchor", fontsize=8
            )
            axis.set_yticks(range(len(pair.english)), pair.english if column == 0 else [], fontsize=8)
            axis.tick_params(length=0)
            for spine in axis.spines.values():
                spine.set_visible(False)
            axis.set_title(f"{sample.name}, {when} tuning", fontsize=9)
    bar = figure.colorbar(image, ax=axes, location="right", shrink=min(1.0, 2.5 / len(samples)), aspect=30, pad=0.01)
    bar.set_label("share of the English word's mass")
    bar.outline.set_visible(False)
    handles = [
        plt.Line2D([], [], linestyle="", marker=marker, markerfacecolor="none", markeredgecolor="#d1603d", label=label)
        for marker, label in (("s", "sure gold link"), ("o", "possible gold link"))
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    return figure
