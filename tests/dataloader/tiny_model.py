"""A small sentence-transformers model with random weights, saved by the library itself."""

from pathlib import Path

WORDS = ["red", "blue", "green", "bottle", "blanket", "crib", "toy", "seat", "soft", "warm", "baby", "small", "large",
         "with", "for", "and"]
DIM = 16
MAX_LENGTH = 32  # tokens


def save_tiny_model(folder: Path, prompts: dict[str, str] | None = None, seed: int = 0) -> Path:
    """Save a BERT with WordPiece and mean pooling; the first of the named `prompts` is the default."""
    import torch
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    base = folder / "bert"
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
                            sep_token="[SEP]", model_max_length=MAX_LENGTH).save_pretrained(base)
    torch.manual_seed(seed)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=DIM, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=32, max_position_embeddings=MAX_LENGTH, initializer_range=1.0)
              ).save_pretrained(base)
    whole = SentenceTransformer(str(base), device="cpu", prompts=prompts,  # adds mean pooling
                                default_prompt_name=next(iter(prompts)) if prompts else None)
    whole.save(str(folder / "model"))
    return folder / "model"
