"""Pretraining of the small multilingual encoder that this project ships and tunes.

Masked language modelling on single sentences plus translation language modelling (Conneau and Lample 2019, section
3.3): a pair is read as `[CLS] x [SEP] y [SEP]` in random order, positions restarting at the second sentence, so a
masked word can be found in its translation. Whole words are masked. Held-out pairs (`training.splits`) are dropped.

    OTKERN_DATA=... python -m training.pretrain --config training/configs/pretrain.yaml --output_dir DIR

The length of the run is a number of steps; batches and masks depend on (seed, step) alone, so a resumed run sees
exactly what an uninterrupted one would have seen.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from training import cli
from training.data import ROOT, read_pairs
from training.splits import held_out_pairs, is_held_out
from training.tokenizer import train_tokenizer, word_starts


def data_folder() -> Path:
    """Return the folder named by the environment variable OTKERN_DATA.

    Raises:
        ValueError: the variable is unset or names no folder; the message says what it must hold.
    """
    folder = os.environ.get("OTKERN_DATA", "")
    if not folder or not Path(folder, "parallel", "train").is_dir():
        raise ValueError(
            f"OTKERN_DATA must name the data folder, with parallel/train/CORPUS.en-XX.tsv.gz below it; it is {folder!r}"
        )
    return Path(folder)


def read_config(path: Path) -> dict:
    """Read a pretraining configuration: the keys of `training/configs/pretrain.yaml`, with values of the same kinds.

    Raises:
        ValueError: a key is missing or unknown, or a value is of another kind; the message names it.
    """
    config, example = (cli.read_yaml_file(p) for p in (path, ROOT / "training/configs/pretrain.yaml"))
    if not isinstance(config, dict) or set(config) != set(example):
        wrong = sorted(map(str, set(example) ^ set(config))) if isinstance(config, dict) else config
        raise ValueError(f"{path} must have the keys of training/configs/pretrain.yaml, but differs in {wrong}")
    for key, known in example.items():
        if type(known) is int and isinstance(config[key], float) and config[key].is_integer():
            config[key] = int(config[key])  # such as 1e4
        kind = (int, float) if isinstance(known, float) else type(known)
        if not isinstance(config[key], kind) or isinstance(config[key], bool) != isinstance(known, bool):
            name = "a number" if isinstance(known, float) else f"of type {type(known).__name__}"
            raise ValueError(f"{path}: {key} must be {name}, but was {config[key]!r}")
    return config


def load_corpora(config: dict, folder: Path) -> tuple[list[tuple[list, int]], dict[str, list]]:
    """Read the training pairs of every corpus and the held-out Tatoeba pairs of every language.

    Args:
        config: `languages` and `copies` (corpus name to {language or "all": repetitions per epoch}).
        folder: the data folder.

    Returns:
        A list of (pairs, copies), one for each file there is, without held-out pairs; and up to 1000 held-out
        pairs of the Tatoeba file by language.
    """
    corpora, held_out = [], {}
    for corpus, copies in config["copies"].items():
        for language in config["languages"]:
            path = folder / "parallel" / "train" / f"{corpus}.en-{language}.tsv.gz"
            if not path.exists():
                continue
            pairs = read_pairs(str(path), language)
            if corpus == "tatoeba":
                held_out[language] = held_out_pairs(pairs)
            kept = [pair for pair in pairs if not is_held_out(pair[0])]
            corpora.append((kept, copies.get(language, copies["all"])))
    if not corpora:
        raise ValueError(f"no file CORPUS.en-XX.tsv.gz of {list(config['copies'])} under {folder / 'parallel/train'}")
    return corpora, held_out


def tokenizer_text(corpora: list[tuple[list, int]], limit: int) -> list[str]:
    """Return at most `limit` sentences of each corpus and side, each English sentence once."""
    sentences = {}
    for pairs, _ in corpora:
        step = max(1, len(pairs) // limit)
        for side in (0, 1):
            sentences.update(dict.fromkeys(pair[side] for pair in pairs[::step][:limit]))
    return list(sentences)


def encode(tokenizer, corpora: list[tuple[list, int]], max_pieces: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenize all pairs.

    Returns:
        `pieces` int32 (sum of lengths,), the sentences one after the other; `offsets` int64 (2P + 1,), sentence s is
        `pieces[offsets[s]:offsets[s + 1]]`, pair p has the sentences 2p (English) and 2p + 1; `copies` int64 (P,).
    """
    ids, copies = [], []
    for pairs, repeat in corpora:
        flat = [sentence for pair in pairs for sentence in pair]
        for start in range(0, len(flat), 10000):
            encoded = tokenizer(flat[start : start + 10000], add_special_tokens=False, verbose=False)
            ids.extend(np.asarray(item[:max_pieces], dtype=np.int32) for item in encoded["input_ids"])
        copies.extend([repeat] * len(pairs))
    offsets = np.concatenate([[0], np.cumsum([len(item) for item in ids])])
    return np.concatenate(ids), offsets, np.asarray(copies)


class MaskedBatches(Dataset):
    """All batches of the run in order: item i is the batch of step i, a pure function of the seed and i."""

    def __init__(self, tokenizer, corpora, config: dict, steps: int, seed: int):
        self.pieces, self.offsets, copies = encode(tokenizer, corpora, config["max_pieces"])
        self.config, self.seed = config, seed
        self.cls_id, self.sep_id, self.pad_id = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
        self.mask_id, self.vocab_size = tokenizer.mask_token_id, len(tokenizer)
        self.starts_word = np.asarray(word_starts(tokenizer))
        self.epoch_starts, self.batches = [], []
        while len(self.batches) < steps:
            self.epoch_starts.append(len(self.batches))
            self.batches += self._plan_epoch(copies, len(self.epoch_starts))
        self.epochs = (
            len(self.epoch_starts) - 1 + (steps - self.epoch_starts[-1]) / (len(self.batches) - self.epoch_starts[-1])
        )
        del self.batches[steps:]

    def _plan_epoch(self, copies: np.ndarray, epoch: int) -> list[np.ndarray]:
        """Return the batches of an epoch, in shuffled order.

        Each is an int64 array (rows, 2) of sentence numbers; -1 in the second column marks a single sentence.
        Rows of similar length come together, as many as fit into `tokens_per_batch`.
        """
        rng = np.random.default_rng([self.seed, epoch])
        pairs = np.repeat(np.arange(len(copies)), copies)
        as_pair = rng.random(len(pairs)) < self.config["pair_fraction"]
        two = np.stack([2 * pairs[as_pair], 2 * pairs[as_pair] + 1], 1)
        swap = rng.random(len(two)) < 0.5
        two[swap] = two[swap][:, ::-1]
        one = np.concatenate([2 * pairs[~as_pair], 2 * pairs[~as_pair] + 1])
        rows = np.concatenate([two, np.stack([one, np.full_like(one, -1)], 1)])
        sizes = np.diff(self.offsets)
        length = sizes[rows[:, 0]] + 2 + np.where(rows[:, 1] >= 0, sizes[rows[:, 1]] + 1, 0)
        order = np.lexsort((rng.random(len(rows)), length))
        batches, start = [], 0
        while start < len(order):
            # The longest row of the batch is its last one, so the number of rows is found by one correction.
            count = max(1, self.config["tokens_per_batch"] // self._padded(length[order[start]]))
            last = order[min(start + count, len(order)) - 1]
            count = max(1, self.config["tokens_per_batch"] // self._padded(length[last]))
            if count == self._padded(length[last]) and count > 1:
                count -= 1  # equal sizes would be compiled again, as a special case
            batches.append(rows[order[start : start + count]])
            start += count
        return [batches[i] for i in rng.permutation(len(batches))]

    @staticmethod
    def _padded(length: int) -> int:
        return -(-int(length) // 8) * 8

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """Return the batch of a step: `input_ids`, `attention_mask`, `position_ids` int64 (rows, length), and the
        flat indices `masked` int64 (K,) of the words to predict with their pieces `targets` int64 (K,)."""
        rng = np.random.default_rng([self.seed, 0, step])
        rows = self.batches[step]
        sentences = [[self.pieces[self.offsets[s] : self.offsets[s + 1]] for s in row if s >= 0] for row in rows]
        width = self._padded(max(1 + sum(len(s) + 1 for s in row) for row in sentences))
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        positions = np.zeros_like(ids)
        for i, row in enumerate(sentences):
            ids[i, 0], start = self.cls_id, 1
            for sentence in row:
                end = start + len(sentence)
                ids[i, start:end], ids[i, end] = sentence, self.sep_id
                positions[i, start : end + 1] = np.arange(1, len(sentence) + 2)
                start = end + 1
        return self._mask(ids, positions, rows[:, 1] >= 0, rng)

    def _mask(self, ids, positions, is_pair, rng) -> dict[str, torch.Tensor]:
        """Choose whole words to predict; of their pieces 80 % become [MASK], 10 % random, 10 % stay (BERT's rule)."""
        flat = ids.ravel()
        rate = np.where(is_pair, self.config["mask_pair"], self.config["mask_single"]).repeat(ids.shape[1])
        word = np.cumsum(self.starts_word[flat]) - 1
        special = np.isin(flat, (self.cls_id, self.sep_id, self.pad_id))
        masked = np.flatnonzero((rng.random(word[-1] + 1)[word] < rate) & ~special)
        if len(masked) == 0:
            masked = np.flatnonzero(~special)[:1]
        targets, draw = flat[masked], rng.random(len(masked))
        noise = rng.integers(5, self.vocab_size, len(masked))
        flat[masked] = np.where(draw < 0.8, self.mask_id, np.where(draw < 0.9, noise, targets))
        arrays = (ids, (ids != self.pad_id).astype(np.int64), positions, masked, targets)
        names = ("input_ids", "attention_mask", "position_ids", "masked", "targets")
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


class PretrainingModel(BertForMaskedLM):
    """BERT whose head and softmax run at the predicted positions only."""

    compiled_loss = None

    def masked_loss(self, input_ids, attention_mask, position_ids, masked, targets) -> torch.Tensor:
        """Return the mean cross-entropy in nats per predicted piece, a scalar in fp32."""
        hidden = self.bert(input_ids, attention_mask=attention_mask, position_ids=position_ids).last_hidden_state
        logits = self.cls(hidden.flatten(0, 1)[masked])  # (K, vocabulary)
        return torch.nn.functional.cross_entropy(logits.float(), targets)

    def forward(self, input_ids, attention_mask, position_ids, masked, targets) -> dict[str, torch.Tensor]:
        loss = self.compiled_loss if self.training and self.compiled_loss is not None else self.masked_loss
        return {"loss": loss(input_ids, attention_mask, position_ids, masked, targets)}


class StepTrainer(Trainer):
    """Trainer that takes ready batches in their given order."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


def build_model(config: dict, vocab_size: int) -> PretrainingModel:
    """Return the untrained encoder of a configuration, no dropout, one segment, fp32."""
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    bert = BertConfig(
        vocab_size=vocab_size,
        **{name: config[name] for name in sizes},
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    # For rows this short plain matrix products beat the fused attention of the CPU, above all in the backward.
    bert._attn_implementation = "eager"
    return PretrainingModel(bert)


def export(model: BertForMaskedLM, folder: Path) -> None:
    """Write config.json and model.safetensors (fp16, head tied to the embeddings) into `folder`."""
    plain = BertForMaskedLM(model.config)
    plain.load_state_dict(model.state_dict())
    plain.half().save_pretrained(folder)


@torch.no_grad()
def held_out_loss(model: PretrainingModel, tokenizer, pairs: dict[str, list], config: dict) -> dict[str, float]:
    """Return the loss on held-out Tatoeba text by kind of input, in nats per piece, with fixed masks.

    Args:
        pairs: held-out (English, other) pairs by language; 200 of each are read.

    Returns:
        `single` (sentences on their own) and `pair` (with their translation).
    """
    was_training = model.training
    model.eval()
    corpora, losses = [(items[:200], 1) for items in pairs.values()], {}
    for kind, fraction in (("single", 0.0), ("pair", 1.0)):
        batches = MaskedBatches(tokenizer, corpora, {**config, "pair_fraction": fraction}, steps=1, seed=0)
        batches.batches = batches._plan_epoch(np.ones(len(batches.offsets) // 2, dtype=np.int64), 1)
        total = count = 0.0
        for step in range(len(batches)):
            batch = batches[step]
            total += model(**batch)["loss"].item() * len(batch["targets"])
            count += len(batch["targets"])
        losses[kind] = total / count
    model.train(was_training)
    return losses


class Snapshots(TrainerCallback):
    """Export the model every `snapshot_steps` steps, with one line a snapshot in STATUS.txt beside the folder."""

    def __init__(self, folder: Path, every: int, tokenizer, held_out: dict, config: dict):
        self.folder, self.every, self.tokenizer = folder, every, tokenizer
        self.held_out, self.config = held_out, config

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        losses = held_out_loss(model, self.tokenizer, self.held_out, self.config) if self.held_out else {}
        export(model, self.folder)
        self.tokenizer.save_pretrained(self.folder)
        with open(self.folder.parent / "STATUS.txt", "a", encoding="utf-8") as status:
            status.write(f"{time.strftime('%H:%M:%S')} step {state.global_step} held-out loss {losses}\n")


def run(config: dict, output_dir: Path, snapshot_dir: Path | None = None, resume: bool = False) -> dict:
    """Train tokenizer and encoder and write the result.

    Args:
        config: the keys of training/configs/pretrain.yaml.
        output_dir: gets the model, the tokenizer, pretrain_metrics.json and the checkpoints.
        snapshot_dir: where to export intermediate models, or None.
        resume: go on from the last checkpoint in `output_dir`.

    Returns:
        What is written to pretrain_metrics.json: steps, tokens, epochs, losses in nats per predicted piece.
    """
    torch.set_num_threads(config["threads"])
    set_seed(config["seed"])
    corpora, held_out = load_corpora(config, data_folder())
    text = tokenizer_text(corpora, config["tokenizer_sentences"])
    tokenizer = train_tokenizer(text, config["vocab_size"], config["max_position_embeddings"])
    batches = MaskedBatches(tokenizer, corpora, config, config["max_steps"], config["seed"])
    model = build_model(config, len(tokenizer))
    untrained = held_out_loss(model, tokenizer, held_out, config) if held_out else {}
    if config["compile"]:
        PretrainingModel.compiled_loss = torch.compile(PretrainingModel.masked_loss, dynamic=True)
    arguments = TrainingArguments(
        output_dir=str(output_dir), max_steps=config["max_steps"], per_device_train_batch_size=1,
        learning_rate=config["learning_rate"], lr_scheduler_type="linear", warmup_steps=config["warmup_steps"],
        weight_decay=config["weight_decay"], adam_beta2=config["adam_beta2"], optim="adamw_torch_fused",
        max_grad_norm=1.0, bf16=config["bf16"], use_cpu=True, seed=config["seed"], save_steps=config["save_steps"],
        save_total_limit=2, logging_steps=config["logging_steps"], remove_unused_columns=False, report_to=[],
    )  # fmt: skip
    callbacks = []
    if snapshot_dir is not None:
        callbacks.append(Snapshots(snapshot_dir, config["snapshot_steps"], tokenizer, held_out, config))
    trainer = StepTrainer(
        model=model, args=arguments, train_dataset=batches, data_collator=lambda items: items[0], callbacks=callbacks
    )
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume or None)
    seconds = time.perf_counter() - started
    tokens = sum(int((batches[i]["attention_mask"]).sum()) for i in range(len(batches)))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = {
        "steps": trainer.state.global_step, "epochs": batches.epochs, "tokens": tokens, "seconds": seconds,
        "parameters": model.num_parameters(), "loss_first": losses[0], "loss_last": losses[-1],
        "held_out_untrained": untrained,
        "held_out": held_out_loss(model, tokenizer, held_out, config) if held_out else {},
    }  # fmt: skip
    export(model, output_dir)
    tokenizer.save_pretrained(output_dir)
    (output_dir / "pretrain_metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return metrics


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, train, print the metrics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--snapshot_dir", type=Path)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output_dir")
    arguments = parser.parse_args(argv)
    data_folder()
    config = read_config(arguments.config)
    print(json.dumps(run(config, arguments.output_dir, arguments.snapshot_dir, arguments.resume), indent=1))


if __name__ == "__main__":
    cli.run(main)
