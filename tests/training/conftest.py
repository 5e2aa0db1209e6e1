"""A tiny random encoder with its own tokenizer, and a tiny parallel corpus with gold links, as files."""

import os

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ENGLISH = "the a dog cat house sees likes big red small old man woman child book reads in of and".split()
CODES = {"de": "x", "fr": "y"}


def translate(word: str, language: str) -> str:
    """The words of the made-up languages are the English ones spelt backwards, with a letter of the language."""
    return CODES[language] + word[::-1]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folder with `train.tsv`, `heldout.tsv` (header en, de, fr) and `gold.en-de.tsv`."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = torch.Generator().manual_seed(0)
    sentences = []
    for _ in range(90):
        size = int(torch.randint(4, 9, (1,), generator=generator))
        sentences.append([ENGLISH[i] for i in torch.randint(len(ENGLISH), (size,), generator=generator).tolist()])
    lines = [
        "\t".join(" ".join(s) for s in [words, *[[translate(w, c) for w in words] for c in CODES]])
        for words in sentences
    ]
    for name, part in (("train", lines[:64]), ("heldout", lines[64:])):
        (folder / f"{name}.tsv").write_text("en\tde\tfr\n" + "\n".join(part) + "\n", encoding="utf-8")
    gold = [
        "\t".join(
            [
                " ".join(words),
                " ".join(translate(w, "de") for w in words),
                " ".join(f"{i}-{i}" for i in range(len(words))),
            ]
        )
        for words in sentences[64:76]
    ]
    (folder / "gold.en-de.tsv").write_text("\n".join(gold) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a random two-layer BERT, d = 32, whose vocabulary holds every word of the corpus."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*ENGLISH, *(translate(w, c)[:3] for w in ENGLISH for c in CODES)]
    pieces = [*words, *(f"##{translate(w, c)[3:]}" for w in ENGLISH for c in CODES if len(w) > 2)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(special + pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    config.otkern = {"alignment_layer": 0, "retrieval_layer": 1}
    folder = tmp_path_factory.mktemp("model")
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(folder)
    return folder
