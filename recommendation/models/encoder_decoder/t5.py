"""The encoder-decoder's weights, to and from transformers' T5ForConditionalGeneration."""

import json
import logging
from pathlib import Path
from typing import Any  # the parts of transformers' models have no types

import torch
import transformers  # which loads a model where it is named
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from common.errors import ArtifactError, ConfigError

from ..generator import START
from .model import EncoderDecoder

log = logging.getLogger(__name__)

# What the two must share; `scale_decoder_outputs` is how transformers 5 says that the head was tied to the embedding.
SHARED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads",
          "relative_attention_num_buckets", "relative_attention_max_distance", "feed_forward_proj",
          "layer_norm_epsilon", "scale_decoder_outputs", "pad_token_id", "decoder_start_token_id")
# Each of a layer's weights, and those of T5's layer that it stacks.
STACKED = {"qkv": ["q", "k", "v"], "query": ["q"], "key_value": ["k", "v"], "out": ["o"], "wi": ["wi"], "wo": ["wo"]}


def to_t5(model: EncoderDecoder) -> Any:
    """A T5ForConditionalGeneration in evaluation with the model's weights.

    Token `1 + sum of the earlier codebook sizes + c` is a level's code c; token 0 is padding and the decoder's
    start, and its row of the head, which the model lacks, is zero. `config.semantic_ids` records what T5 has no
    place for: the sizes of the codebooks, the mask of the encoder, and the bias of cross-attention.
    """
    t5: Any = transformers.T5ForConditionalGeneration(t5_config(model)).eval()
    # Whatever the config says, transformers 5 ties the head of a T5 to its embedding when it is built.
    t5.lm_head.weight = nn.Parameter(torch.zeros_like(t5.shared.weight))
    t5.all_tied_weights_keys.pop("lm_head.weight", None)
    t5.config.tie_word_embeddings = False  # for config.json: that is what other versions of transformers go by
    with torch.no_grad():
        for ours, theirs in weight_pairs(model, t5):
            for part, weight in zip(ours.chunk(len(theirs)), theirs, strict=True):
                weight.copy_(part)
        t5.lm_head.weight[1 + START:] = torch.cat([head.weight for head in model.heads])
    t5.generation_config = _generation_config(model)
    return t5


def t5_config(model: EncoderDecoder) -> "transformers.T5Config":
    params = model.config["encoder_decoder"]["model_params"]
    own = {"train_on": model.train_on, **model.properties(), "codebook_sizes": model.catalogue.codebook_sizes}
    if model.memory_bias is not None:
        own["memory_bias"] = model.memory_bias.weight.tolist()  # digits enough to come back as the same float32
    return transformers.T5Config(  # type: ignore[call-arg]
        vocab_size=model.embedding.num_embeddings, d_model=params["d_model"], d_kv=params["d_kv"],
        d_ff=params["d_ff"], num_layers=params["num_encoder_layers"], num_decoder_layers=params["num_decoder_layers"],
        num_heads=params["num_heads"], relative_attention_num_buckets=params["num_buckets"],
        relative_attention_max_distance=params["max_distance"], dropout_rate=params["dropout"],
        layer_norm_epsilon=model.encoder_norm.epsilon, feed_forward_proj="relu", tie_word_embeddings=False,
        pad_token_id=START, decoder_start_token_id=START, eos_token_id=None, semantic_ids=own)


def _generation_config(model: EncoderDecoder) -> "transformers.GenerationConfig":
    """The model's search: the sum of log-probabilities, and an ID is as long as it has levels."""
    of_beams = {"num_beams": model.num_beams, "length_penalty": 0.0} if model.num_beams > 1 else {}
    return transformers.GenerationConfig(max_new_tokens=model.num_levels, renormalize_logits=True, pad_token_id=START,
                                         decoder_start_token_id=START, eos_token_id=None, **of_beams)


@torch.no_grad()
def load_t5(model: EncoderDecoder, t5: Any) -> None:
    """Copy the weights of a T5 of the model's sizes into it.

    The bias of cross-attention is taken from `config.semantic_ids`; a T5 without it has, in effect, one of zero.
    Raises ConfigError for a T5 of other sizes or of another kind.
    """
    own = _require_alike(model, t5)
    for ours, theirs in weight_pairs(model, t5):
        ours.copy_(torch.cat(theirs))
    sizes = model.catalogue.codebook_sizes
    for head, rows in zip(model.heads, t5.lm_head.weight[1 + START:].split(sizes), strict=True):
        head.weight.copy_(rows)
    if model.memory_bias is not None:
        weight = model.memory_bias.weight
        weight.copy_(torch.tensor(own["memory_bias"]) if "memory_bias" in own else torch.zeros_like(weight))
    mask = own.get("encoder_mask", "full")
    if mask != model.properties()["encoder_mask"]:
        log.info("the T5 was trained with the encoder mask %r and goes on with %r", mask,
                 model.properties()["encoder_mask"])


def _require_alike(model: EncoderDecoder, t5: Any) -> dict:
    """What the T5's config says of semantic IDs, once all that the two share has been compared."""
    where, wanted = t5.name_or_path or "T5", t5_config(model)
    own = getattr(t5.config, "semantic_ids", None) or {}
    values = [(key, getattr(t5.config, key), getattr(wanted, key)) for key in SHARED]
    if "codebook_sizes" in own:
        values.append(("codebook_sizes", own["codebook_sizes"], model.catalogue.codebook_sizes))
    if "memory_bias" in own and model.memory_bias is not None:
        values.append(("memory_bias", torch.tensor(own["memory_bias"]).shape, model.memory_bias.weight.shape))
    for key, theirs, ours in values:
        if theirs != ours:
            raise ConfigError(f"{where}: {key}", f"is {theirs!r}", f"the model has {ours!r}",
                              "a T5 of the same sizes and kind, or a model of the T5's")
    return own


def read_t5(folder: Path) -> Any:
    """The T5 of a folder that `save_pretrained` wrote, in float32 and with every weight read from it."""
    fix = "a folder that --export_t5 or save_pretrained of a T5ForConditionalGeneration wrote"
    quiet()
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "t5":
            raise ConfigError(folder / "config.json", f"model_type is {kind!r}", "the model is a 't5'", fix)
        loaded: Any = transformers.T5ForConditionalGeneration.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True)
        t5, report = loaded
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise ArtifactError(folder, "cannot be read as a T5", str(error), fix) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise ArtifactError(folder, f"its weights do not fit its config.json: {what.replace('_', ' ')}",
                                ", ".join(sorted(map(str, report[what]))[:3]), fix)
    return t5


def quiet() -> None:
    """No bars, and no word on the untied head, which transformers 5 finds odd in a T5 and loads as it is."""
    disable_progress_bar()
    set_verbosity_error()


def weight_pairs(model: EncoderDecoder, t5: Any) -> list[tuple[Tensor, list[Tensor]]]:
    """Each of the model's weights and those of T5 that it stacks; the heads and the bias of cross-attention apart."""
    pairs = [(model.embedding.weight, [t5.shared.weight])]
    stacks: list[Any] = [(model.encoder, t5.encoder, model.encoder_bias, model.encoder_norm),
                         (model.decoder, t5.decoder, model.decoder_bias, model.decoder_norm)]
    for layers, stack, bias, norm in stacks:
        pairs.append((bias.weight, [stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight]))
        pairs.append((norm.weight, [stack.final_layer_norm.weight]))
        for ours, block in zip(layers, stack.block, strict=True):
            for layer, part in zip(ours, block.layer, strict=True):
                _, theirs = next(part.named_children())  # SelfAttention, EncDecAttention or DenseReluDense
                pairs.append((layer.norm.weight, [part.layer_norm.weight]))
                pairs += [(getattr(layer, own).weight, [getattr(theirs, name).weight for name in names])
                          for own, names in STACKED.items() if hasattr(layer, own)]
    return pairs
