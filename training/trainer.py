"""The batches of an alignment run and the `Trainer` that tunes on them."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from torch.utils.data import Dataset, SequentialSampler

from training import encoder
from training.encoder import Sentence
from training.loss import alignment_loss

BUCKET_STEPS = 16


@dataclass
class Corpus:
    """The tokenised training pairs of one language: sentences of the other language and of English, row by row."""

    language: str
    other: list[Sentence]
    english: list[Sentence]


@dataclass
class Step:
    """What one training step sees: the other languages' and the English batch, and the rows of each language pair."""

    tokens: list[encoder.Tokens]
    groups: list[slice]
    stage: int
    progress: float


class Steps(Dataset):
    """Every step of a run, each a function of the seed and its number, so that a resumed run sees the same batches.

    A step holds `batch_pairs` pairs of each language, of similar length across all of them, so that little is padded.

    Args:
        corpora: training pairs by language.
        stages: stages of the configuration.
        batch_pairs: pairs a language and step.
        seed: of the order.
        pad_id: padding token.
    """

    def __init__(self, corpora: Sequence[Corpus], stages: Sequence[dict], batch_pairs: int, seed: int, pad_id: int):
        self.corpora, self.batch_pairs, self.seed, self.pad_id = corpora, batch_pairs, seed, pad_id
        longest = max(len(corpus.english) for corpus in corpora)
        self.steps_per_epoch = max(1, math.ceil(longest / batch_pairs))
        self.stage_steps = [max(1, round(stage["epochs"] * self.steps_per_epoch)) for stage in stages]
        self._epochs = {}

    def __len__(self) -> int:
        return sum(self.stage_steps)

    def stage_of(self, step: int) -> tuple[int, float]:
        """Return the stage of a step and how much of the stage is done, 0…1."""
        stage = 0
        while stage < len(self.stage_steps) - 1 and step >= self.stage_steps[stage]:
            step -= self.stage_steps[stage]
            stage += 1
        return stage, min(1.0, step / self.stage_steps[stage])

    def __getitem__(self, step: int) -> Step:
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch not in self._epochs:
            self._epochs = {epoch: self._shuffle(epoch)}
        others, english, groups = [], [], []
        for corpus, batches in zip(self.corpora, self._epochs[epoch], strict=True):
            rows = batches[position]
            groups.append(slice(len(others), len(others) + len(rows)))
            others += [corpus.other[row] for row in rows]
            english += [corpus.english[row] for row in rows]
        tokens = [encoder.pad(side, self.pad_id) for side in (others, english)]
        return Step(tokens, groups, *self.stage_of(step))

    def _shuffle(self, epoch: int) -> list[list[list[int]]]:
        """Return for each language the rows of each step of an epoch; smaller corpora start again from the front."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        n_rows = self.steps_per_epoch * self.batch_pairs
        order = [
            step for start in range(0, self.steps_per_epoch, BUCKET_STEPS) for step in self._bucket(start, generator)
        ]
        result = []
        for corpus in self.corpora:
            rows = []
            while len(rows) < n_rows:
                rows += torch.randperm(len(corpus.english), generator=generator).tolist()
            rows = rows[:n_rows] if len(corpus.english) < n_rows else rows
            batches = []
            for start in range(0, n_rows, BUCKET_STEPS * self.batch_pairs):
                bucket = rows[start : min(start + BUCKET_STEPS * self.batch_pairs, n_rows)]
                bucket.sort(key=lambda row: len(corpus.english[row].ids) + len(corpus.other[row].ids))
                batches += [bucket[i : i + self.batch_pairs] for i in range(0, len(bucket), self.batch_pairs)]
            result.append([batches[step] for step in order])
        return result

    def _bucket(self, start: int, generator: torch.Generator) -> list[int]:
        """The steps of one bucket in random order, the same for all languages."""
        size = min(BUCKET_STEPS, self.steps_per_epoch - start)
        return [start + step for step in torch.randperm(size, generator=generator).tolist()]


class AlignmentTrainer(transformers.Trainer):
    """Trainer whose loss is the alignment loss, whose learning rate and trainable parameters follow the stages.

    Args:
        reference: a frozen copy of the initial model, for the regulariser.
        steps: the training steps; one is one batch.
        stages: stages of the configuration, layers already numbered from 0.
        bf16: whether the encoder runs under bfloat16 autocast.
        betas: of Adam.
        **arguments: as for `transformers.Trainer`.
    """

    def __init__(self, *, reference, steps: Steps, stages: Sequence[dict], bf16: bool, betas, **arguments):
        super().__init__(train_dataset=steps, data_collator=lambda items: {"step": items[0]}, **arguments)
        self.reference = reference.to(self.args.device).eval().requires_grad_(False)
        self.steps, self.stages, self.bf16, self.betas = steps, stages, bf16, betas
        self._parts, self._n_parts = {}, 0

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, model=None):
        """Adam without weight decay over all parameters; those of a frozen stage get no gradient and stay."""
        peak = max(stage["learning_rate"] for stage in self.stages)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=peak, betas=tuple(self.betas), weight_decay=0.0)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Linear warm-up and linear decay to zero, once a stage."""
        peak = max(stage["learning_rate"] for stage in self.stages)

        def factor(step: int) -> float:
            stage, progress = self.steps.stage_of(step)
            warmup = self.stages[stage]["warmup"]
            # Steps count from 0, so that without this half step the first update of a stage would be lost.
            progress = progress + 0.5 / self.steps.stage_steps[stage]
            ramp = progress / warmup if progress < warmup else (1 - progress) / (1 - warmup)
            return max(ramp, 0.0) * self.stages[stage]["learning_rate"] / peak

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Encode both sides of a step as far up as its stage needs and return the alignment loss."""
        step: Step = inputs["step"]
        stage = self.stages[step.stage]
        self._freeze(model, stage["trainable"])
        tokens = [side.to(self.args.device) for side in step.tokens]
        layers = {*stage["layers"], *([] if stage["plan_layer"] is None else [stage["plan_layer"]])}
        if stage["sentence_contrast"]["weight"]:
            layers.add(stage["sentence_contrast"]["layer"])
        states = [encoder.hidden_states(model, side, layers, self.bf16) for side in tokens]
        frozen = {}
        if stage["regulariser"]:
            with torch.no_grad():
                frozen = encoder.hidden_states(self.reference, tokens[1], stage["layers"], self.bf16)
        start, end = stage["position_prior"]
        prior = start + (end - start) * step.progress
        loss, parts = alignment_loss(states, frozen, tokens, step.groups, stage, prior)
        if model.training:
            for name, value in {**parts, "stage": step.stage, "position_prior": prior}.items():
                self._parts.setdefault(name, []).append(value)
        return (loss, parts) if return_outputs else loss

    @staticmethod
    def _freeze(model, trainable: Sequence[str] | None) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable is None or any(re.search(pattern, name) for pattern in trainable))

    def log(self, logs: dict, *arguments, **keywords) -> None:
        """Add the means of the loss's parts since the last log."""
        if "loss" in logs:
            logs = logs | {name: sum(values) / len(values) for name, values in self._parts.items()}
            self._parts = {}
        super().log(logs, *arguments, **keywords)
