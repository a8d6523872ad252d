"""Convert the encoder-decoder to and from the T5ForConditionalGeneration of transformers."""

import logging
from pathlib import Path
from typing import Any  # for models of transformers, because their submodules have no types

import torch
import transformers  # this import is cheap: transformers imports a model at its first use
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from common.errors import ArtifactError, ConfigError
from common.reading import parse_json, read_text

from ..generator import START
from ..layers import EPSILON, join_weights, split_weight
from .model import EncoderDecoder

log = logging.getLogger(__name__)

# Config values that must be the same in both models. transformers 5 sets `scale_decoder_outputs` if the head was tied
# to the embedding.
SHARED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads",
          "relative_attention_num_buckets", "relative_attention_max_distance", "feed_forward_proj",
          "layer_norm_epsilon", "scale_decoder_outputs", "pad_token_id", "decoder_start_token_id")
# Name of our weight -> names of the T5 weights that it joins.
JOINED = {"qkv": ["q", "k", "v"], "query": ["q"], "out": ["o"], "wi": ["wi"], "wo": ["wo"]}


def to_t5(model: EncoderDecoder) -> Any:
    """Return a T5ForConditionalGeneration in eval mode with the model's weights.

    Code c of a level is the token `1 + sum of the earlier codebook sizes + c`. Token 0 is the padding token and the
    start token of the decoder. The model has no output weights for token 0, so the logit of token 0 in the T5 is always
    0.

    T5 has no codebook sizes, no encoder mask and no cross-attention bias. `config.semantic_ids` stores these values.
    """
    t5: Any = transformers.T5ForConditionalGeneration(t5_config(model)).eval()
    # transformers 5 always ties the head of a new T5 to the embedding. It ignores the config.
    t5.lm_head.weight = nn.Parameter(torch.zeros_like(t5.shared.weight))
    t5.all_tied_weights_keys.pop("lm_head.weight", None)
    t5.config.tie_word_embeddings = False  # for config.json; other versions of transformers read this value
    with torch.no_grad():
        for ours, theirs in weight_pairs(model, t5):
            for part, weight in zip(_split(model, ours, len(theirs)), theirs, strict=True):
                weight.copy_(part)
        t5.lm_head.weight[1 + START:] = head_weights(model, model.heads)
    t5.generation_config = _generation_config(model)
    return t5


def t5_config(model: EncoderDecoder) -> "transformers.T5Config":
    params = model.config["encoder_decoder"]["model_params"]
    own = {"train_on": model.train_on, **model.properties(), "codebook_sizes": model.catalogue.codebook_sizes}
    if model.memory_bias is not None:
        own["memory_bias"] = model.memory_bias.weight.tolist()  # enough digits to restore the same float32 values
    return transformers.T5Config(  # type: ignore[call-arg]
        vocab_size=model.embedding.num_embeddings, d_model=params["d_model"], d_kv=params["d_kv"],
        d_ff=params["d_ff"], num_layers=params["num_encoder_layers"], num_decoder_layers=params["num_decoder_layers"],
        num_heads=params["num_heads"], relative_attention_num_buckets=params["num_buckets"],
        relative_attention_max_distance=params["max_distance"], dropout_rate=params["dropout"],
        layer_norm_epsilon=EPSILON, feed_forward_proj="relu", tie_word_embeddings=False,
        pad_token_id=START, decoder_start_token_id=START, eos_token_id=None, semantic_ids=own)


def _generation_config(model: EncoderDecoder) -> "transformers.GenerationConfig":
    """Return settings for `generate`: the beam width of the model, and one new token per level.

    The score of a beam is the sum of the log-probabilities of its tokens.
    """
    of_beams = {"num_beams": model.num_beams, "length_penalty": 0.0} if model.num_beams > 1 else {}
    return transformers.GenerationConfig(max_new_tokens=model.num_levels, renormalize_logits=True, pad_token_id=START,
                                         decoder_start_token_id=START, eos_token_id=None, **of_beams)


@torch.no_grad()
def load_t5(model: EncoderDecoder, t5: Any) -> None:
    """Copy the weights of `t5` into the model.

    The cross-attention bias is read from `config.semantic_ids` of the T5. If it is missing there, the bias is set to
    zero and has no effect.

    Raises ConfigError if the sizes or layers of the T5 and of the model differ.
    """
    own = _check_compatible(model, t5)
    for ours, theirs in weight_pairs(model, t5):
        ours.copy_(join(model, theirs))
    model.heads.zero_()  # the rows of codes that do not exist
    sizes = model.catalogue.codebook_sizes
    for head, rows in zip(model.heads, t5.lm_head.weight[1 + START:].split(sizes), strict=True):
        head[:len(rows)] = rows
    if model.memory_bias is not None:
        weight = model.memory_bias.weight
        weight.copy_(torch.tensor(own["memory_bias"]) if "memory_bias" in own else torch.zeros_like(weight))
    mask = own.get("encoder_mask", "full")
    if mask != model.properties()["encoder_mask"]:
        log.info("the T5 was trained with the encoder mask %r, but this model uses the encoder mask %r", mask,
                 model.properties()["encoder_mask"])


def _check_compatible(model: EncoderDecoder, t5: Any) -> dict:
    """Return `config.semantic_ids` of the T5, or an empty dict if it is missing.

    Raises ConfigError if the sizes or layers of the T5 and of the model differ.
    """
    where, wanted = t5.name_or_path or "T5", t5_config(model)
    own = getattr(t5.config, "semantic_ids", None) or {}
    values = [(key, getattr(t5.config, key), getattr(wanted, key)) for key in SHARED]
    if "codebook_sizes" in own:
        values.append(("codebook_sizes", own["codebook_sizes"], model.catalogue.codebook_sizes))
    if "memory_bias" in own and model.memory_bias is not None:
        values.append(("memory_bias", torch.tensor(own["memory_bias"]).shape, model.memory_bias.weight.shape))
    for key, theirs, ours in values:
        if theirs != ours:
            raise ConfigError(f"{where}: {key}", f"must be {ours!r}, got {theirs!r}",
                              "The T5 must have the same sizes and layers as the model",
                              "use another T5, or set the parameters of the model to the values of the T5")
    return own


def read_t5(folder: Path) -> Any:
    """Load a T5 in float32 from a folder that `save_pretrained` wrote.

    Raises ConfigError if the folder contains another kind of model. Raises ArtifactError if the folder cannot be read,
    or if the weights in it do not match its config.json.
    """
    fix = "use a folder written by --export_t5 or by save_pretrained of a T5ForConditionalGeneration"
    quiet()
    try:
        kind = parse_json(read_text(folder / "config.json")).get("model_type")
        if kind != "t5":
            raise ConfigError(folder / "config.json", f"model_type must be 't5', got {kind!r}", fix=fix)
        loaded: Any = transformers.T5ForConditionalGeneration.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True)
        t5, report = loaded
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise ArtifactError(folder, "cannot be loaded as a T5", str(error), fix) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise ArtifactError(folder, "the weights do not match config.json",
                                f"{problem.replace('_', ' ').capitalize()} (at most three are shown): "
                                + ", ".join(sorted(map(str, report[problem]))[:3]), fix)
    return t5


def quiet() -> None:
    """Turn off the progress bars and warnings of transformers."""
    # transformers 5 warns about heads that are not tied to the embedding, although it loads them correctly.
    disable_progress_bar()
    set_verbosity_error()


def weight_pairs(model: EncoderDecoder, t5: Any) -> list[tuple[Tensor, list[Tensor]]]:
    """For each weight of the model, return a pair: the weight, and the list of T5 weights that it joins (see `join`).

    The output heads and the cross-attention bias are not included.
    """
    assert not [*model.projection.parameters()], "a T5 reads one position per code"
    pairs = [(model.embedding.weight, [t5.shared.weight])]
    memory = [block.layer[1].EncDecAttention for block in t5.decoder.block]
    pairs.append((model.memory.key_value.weight, [part.weight for layer in memory for part in (layer.k, layer.v)]))
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
                          for own, names in JOINED.items() if hasattr(layer, own)]
    return pairs


def join(model: EncoderDecoder, theirs: list[Tensor]) -> Tensor:
    """Join the T5 weights of one of our weights. Our attention has the parts of a head next to each other."""
    return theirs[0] if len(theirs) == 1 else join_weights(theirs, model.memory.num_heads)


def _split(model: EncoderDecoder, weight: Tensor, num_parts: int) -> list[Tensor]:
    """The inverse of `join`."""
    return [weight] if num_parts == 1 else split_weight(weight, model.memory.num_heads, num_parts)


def head_weights(model: EncoderDecoder, heads: Tensor) -> Tensor:
    """Return the rows of the heads for the codes that exist: (L, C, M) -> (sum of the codebook sizes, M)."""
    return torch.cat([head[:size] for head, size in zip(heads, model.catalogue.codebook_sizes, strict=True)])
