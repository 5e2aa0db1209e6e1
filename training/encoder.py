"""An encoder seen as a function from words to contextual vectors: tokenising, running, gathering subwords to words."""

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.data import ROOT

UNITS = ("word", "subword")
WORD_VECTORS = ("last", "first", "mean")


@dataclass
class Tokens:
    """A padded batch of tokenised sentences.

    Attributes:
        input_ids: (S, T) int64.
        attention_mask: (S, T) int64.
        word_index: (S, T) int64, the word that a subword belongs to, −1 for special tokens and padding.
        n_words: (S,) int64, the number of words of each sentence.
    """

    input_ids: Tensor
    attention_mask: Tensor
    word_index: Tensor
    n_words: Tensor

    def to(self, device: torch.device) -> "Tokens":
        """Return the batch on `device`."""
        return Tokens(
            *(getattr(self, field).to(device) for field in ("input_ids", "attention_mask", "word_index", "n_words"))
        )


@dataclass
class Sentence:
    """One tokenised sentence, of the words that have subwords: those cut off or without any are no points.

    Attributes:
        ids: subwords with special tokens.
        words: of each subword its word's place among `kept` (−1: special).
        kept: of each word with subwords its index in the sentence that was given.
    """

    ids: list[int]
    words: list[int]
    kept: list[int]

    @property
    def n_words(self) -> int:
        """How many words have subwords."""
        return len(self.kept)


def find_model(name: str) -> str:
    """Return a local folder if `name` is one (here or in the project), else the name for the model hub."""
    expanded = os.path.expandvars(os.path.expanduser(str(name)))
    for candidate in (expanded, ROOT / expanded):
        if os.path.isdir(candidate):
            return str(candidate)
    return expanded


def load_encoder(name: str) -> tuple[nn.Module, object]:
    """Load any `AutoModel` in float32, without its pooling layer, and its fast tokenizer.

    Args:
        name: folder or hub name.

    Returns:
        (model in evaluation mode, tokenizer).

    Raises:
        ValueError: there is no such model, its files are damaged, or the tokenizer is a slow one, which cannot tell
            which subword belongs to which word.
    """
    import safetensors
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = find_model(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, use_fast=True)
    except (ValueError, OSError) as error:
        raise ValueError(f"model {name!r} has no tokenizer that can be loaded: {error}") from None
    if not tokenizer.is_fast:
        raise ValueError(
            f"model must come with a fast tokenizer (word indices of subwords), but {name!r} has a slow one"
        )
    # For sentences this short, plain matrix products beat the fused attention of the CPU, above all in the backward.
    options = {"dtype": torch.float32, "attn_implementation": None if torch.cuda.is_available() else "eager"}
    try:
        try:
            model = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False, **options)
        except TypeError:
            model = transformers.AutoModel.from_pretrained(path, **options)
    except (ValueError, OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"model {name!r} cannot be loaded: {error}") from None
    return model.eval(), tokenizer


def card_settings(model: nn.Module) -> dict:
    """Return the `otkern` part of the model's configuration: best layers and extraction settings; {} if it has none."""
    return dict(getattr(model.config, "otkern", None) or {})


def number_of_layers(model: nn.Module) -> int:
    """Return how many blocks the encoder has; hidden states are numbered 0 (embedding layer) to this."""
    return int(model.config.num_hidden_layers)


def check_layer(layer: int, model: nn.Module, argument: str = "layer") -> int:
    """Return `layer` as a number from 0, counting negative ones from the end.

    Raises:
        ValueError: there is no such layer.
    """
    n_layers = number_of_layers(model)
    if not isinstance(layer, int) or not -n_layers - 1 <= layer <= n_layers:
        raise ValueError(f"{argument} must be an integer from {-n_layers - 1} to {n_layers}, but was {layer!r}")
    return layer % (n_layers + 1)


def tokenize(tokenizer, sentences: Sequence[Sequence[str]], max_length: int = 128) -> list[Sentence]:
    """Tokenise sentences that are already split into words.

    Args:
        tokenizer: a fast tokenizer.
        sentences: words of each sentence.
        max_length: longest sequence in subwords with special tokens; what comes after is cut off.

    Returns:
        One `Sentence` each. A word that was cut off or gave no subword is no point: it takes no mass in training and
        is never linked. A warning says how many there are.
    """
    limit = min(max_length, tokenizer.model_max_length)
    encoding = tokenizer(
        [list(words) for words in sentences], is_split_into_words=True, truncation=True, max_length=limit
    )
    result, lost, shortened = [], 0, 0
    for s, words in enumerate(sentences):
        of_subwords = encoding.word_ids(s)
        kept = list(dict.fromkeys(w for w in of_subwords if w is not None))
        place = {w: k for k, w in enumerate(kept)}
        result.append(Sentence(encoding["input_ids"][s], [-1 if w is None else place[w] for w in of_subwords], kept))
        lost, shortened = lost + len(words) - len(kept), shortened + (len(kept) < len(words))
    if lost:
        warnings.warn(
            f"{lost} words of {shortened} of {len(sentences)} sentences have no vector and are left out: they lie "
            f"behind the first {limit} subwords, or the tokenizer has no subword for them",
            stacklevel=2,
        )
    return result


def pad(sentences: Sequence[Sentence], pad_id: int) -> Tokens:
    """Stack tokenised sentences, padded on the right to the longest."""
    longest = max(len(sentence.ids) for sentence in sentences)
    shape = (len(sentences), longest)
    ids, words = torch.full(shape, pad_id), torch.full(shape, -1)
    mask = torch.zeros(shape, dtype=torch.long)
    for s, sentence in enumerate(sentences):
        n = len(sentence.ids)
        ids[s, :n] = torch.tensor(sentence.ids)
        words[s, :n] = torch.tensor(sentence.words)
        mask[s, :n] = 1
    return Tokens(ids, mask, words, torch.tensor([sentence.n_words for sentence in sentences]))


def hidden_states(model: nn.Module, tokens: Tokens, layers: Iterable[int], bf16: bool = False) -> dict[int, Tensor]:
    """Run the encoder as far as needed.

    Args:
        model: the encoder.
        tokens: S sentences of T subwords.
        layers: numbers of hidden states, 0: the embedding layer, k: after block k.
        bf16: run it under bfloat16 autocast; the result is float32 all the same.

    Returns:
        {layer: (S, T, D) float32}, differentiable.
    """
    layers = set(layers)
    inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    with torch.autocast(tokens.input_ids.device.type, dtype=torch.bfloat16, enabled=bf16):
        if _has_plain_blocks(model):
            states = _run_first_blocks(model, inputs, max(layers))
        else:
            states = model(**inputs, output_hidden_states=True).hidden_states
    return {layer: states[layer].float() for layer in layers}


def _has_plain_blocks(model: nn.Module) -> bool:
    """BERT's family: an embedding module, then a list of post-norm blocks whose outputs are the hidden states."""
    blocks = getattr(getattr(model, "encoder", None), "layer", None)
    return isinstance(blocks, nn.ModuleList) and isinstance(getattr(model, "embeddings", None), nn.Module)


def _run_first_blocks(model: nn.Module, inputs: dict, n_blocks: int) -> list[Tensor]:
    """Run the embedding module and the first blocks alone, and return what each of them puts out."""
    states, blocks = [], model.encoder.layer

    def keep(module, arguments, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(keep) for module in (model.embeddings, *blocks[:n_blocks])]
    model.encoder.layer = blocks[:n_blocks]
    try:
        model(**inputs)
    finally:
        model.encoder.layer = blocks
        for hook in hooks:
            hook.remove()
    return states


def use_bf16(precision: str, device: torch.device) -> bool:
    """Decide whether autocast pays: `auto` takes bfloat16 where the hardware multiplies it faster than float32.

    Raises:
        ValueError: `precision` is not one of `auto`, `fp32`, `bf16`.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision must be 'auto', 'fp32' or 'bf16', but was {precision!r}")
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def subword_vectors(hidden: Tensor, tokens: Tokens, keep_special: bool = False) -> tuple[Tensor, Tensor]:
    """Gather the subwords of each sentence to the front.

    Args:
        hidden: (S, T, D).
        tokens: the batch.
        keep_special: count special tokens as points, too.

    Returns:
        (S, N, D) vectors, exactly 0 in the padding, and (S,) lengths.
    """
    kept = tokens.attention_mask.bool() if keep_special else tokens.word_index >= 0
    lengths = kept.sum(1)
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(int(lengths.max()), 1)]
    gathered = hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))
    inside = torch.arange(order.shape[1], device=hidden.device) < lengths[:, None]
    return gathered * inside[..., None], lengths


def word_vectors(hidden: Tensor, tokens: Tokens, how: str = "mean") -> tuple[Tensor, Tensor]:
    """Turn subword vectors into one vector a word.

    Args:
        hidden: (S, T, D).
        tokens: the batch.
        how: `last` or `first` subword of the word, or `mean` over them.

    Returns:
        (S, W, D) vectors, exactly 0 in the padding and for words without subwords, and (S,) lengths.

    Raises:
        ValueError: `how` is none of these.
    """
    if how not in WORD_VECTORS:
        raise ValueError(f"word_vector must be one of {WORD_VECTORS}, but was {how!r}")
    word, (n_sentences, _, size) = tokens.word_index, hidden.shape
    n_words = max(int(tokens.n_words.max()), 1)
    inside = word >= 0
    if how != "mean":
        border = torch.full_like(word[:, :1], -2)
        neighbour = torch.cat([word[:, 1:], border], 1) if how == "last" else torch.cat([border, word[:, :-1]], 1)
        inside = inside & (word != neighbour)
    sentence, position = inside.nonzero(as_tuple=True)
    target = sentence * n_words + word[sentence, position]
    flat = hidden.new_zeros(n_sentences * n_words, size).index_add(0, target, hidden[sentence, position])
    if how == "mean":
        counts = torch.bincount(target, minlength=n_sentences * n_words).clamp_min(1)
        flat = flat / counts[:, None]
    return flat.view(n_sentences, n_words, size), tokens.n_words


def sentence_vectors(hidden: Tensor, tokens: Tokens) -> Tensor:
    """Average the subwords of each sentence, special tokens left out: (S, T, D) to (S, D)."""
    inside = (tokens.word_index >= 0).to(hidden.dtype)
    return torch.einsum("std,st->sd", hidden, inside) / inside.sum(1, keepdim=True).clamp_min(1)


def encode(
    model: nn.Module,
    sentences: Sequence[Sentence],
    layers: Sequence[int],
    pad_id: int,
    gather,
    batch_tokens: int = 8192,
    bf16: bool = False,
) -> dict[int, list[Tensor]]:
    """Encode many sentences without gradients, in batches of similar length, and return them in their own order.

    Args:
        model: the encoder.
        sentences: tokenised sentences.
        layers: layers wanted.
        pad_id: id of the padding token.
        gather: function (hidden, tokens) → vectors (S, ..., D), or vectors with lengths, applied to each layer.
        batch_tokens: padded subwords in a batch at most.
        bf16: autocast.

    Returns:
        {layer: one tensor a sentence}, on the CPU: (D,) where `gather` gives vectors alone, (n, D) with lengths.
    """
    order = sorted(range(len(sentences)), key=lambda s: len(sentences[s].ids))
    result = {layer: [None] * len(sentences) for layer in layers}
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    start = 0
    with torch.no_grad():
        while start < len(order):
            size = 1
            while start + size < len(order) and (size + 1) * len(sentences[order[start + size]].ids) <= batch_tokens:
                size += 1
            chosen = order[start : start + size]
            tokens = pad([sentences[s] for s in chosen], pad_id).to(device)
            for layer, hidden in hidden_states(model, tokens, layers, bf16).items():
                gathered = gather(hidden, tokens)
                vectors, lengths = gathered if isinstance(gathered, tuple) else (gathered, None)
                for row, s in enumerate(chosen):
                    vector = vectors[row] if lengths is None else vectors[row, : int(lengths[row])]
                    result[layer][s] = vector.cpu().clone()
            start += size
    model.train(was_training)
    return result
