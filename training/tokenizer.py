"""The tokenizer of the small encoder: one lower-cased BPE vocabulary shared by all languages.

Every word and every punctuation mark begins a new piece, so a sentence splits in the same way whether it comes as
raw text or as a list of words; word alignment data come as the latter.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORD_START = "▁"


def train_tokenizer(sentences: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-pair-encoding tokenizer (Sennrich et al. 2016) on raw sentences and wrap it for transformers.

    BPE and not the unigram model, because the latter leaves the word-start mark before punctuation and one-letter
    words as a piece of its own.

    Args:
        sentences: the text, one sentence an item.
        vocab_size: number of pieces, the five special tokens included.
        max_length: `model_max_length` of the result, in pieces.

    Returns:
        A fast tokenizer: NFKC, lower case, `[CLS] … [SEP]` around a sentence. It may have fewer pieces than asked
        for when the text is small.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace(replacement=WORD_START, prepend_scheme="always")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, limit_alphabet=300, show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    cls_id, sep_id = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", cls_id), ("[SEP]", sep_id)],
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


def word_starts(tokenizer: PreTrainedTokenizerFast) -> list[bool]:
    """Tell for each piece of the vocabulary, by id, whether it begins a word (special tokens do)."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [piece.startswith(WORD_START) or piece in SPECIAL_TOKENS for piece in pieces]
