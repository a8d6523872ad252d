"""A causal stack of our blocks as transformers' T5 decoder, for an oracle from outside."""

import torch
from torch import Tensor, nn

from recommendation.models.layers import split_weight

NUM_BUCKETS, MAX_DISTANCE = 8, 16


@torch.no_grad()
def causal_stack(layers: nn.ModuleList, norm: nn.Module, bias: Tensor | None, x: Tensor) -> Tensor:
    """Hidden states (B, T, M) of T5's decoder with these weights, its cross-attention silenced.

    `layers` are pairs of self-attention and feed-forward; `bias` (buckets, heads) is the relative bias.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    attention, feed_forward = layers[0]
    width, num_heads = x.shape[-1], attention.num_heads
    config = T5Config(vocab_size=2, d_model=width, d_kv=attention.out.in_features // num_heads,
                      d_ff=feed_forward.wi.out_features, num_layers=1, num_decoder_layers=len(layers),
                      num_heads=num_heads, relative_attention_num_buckets=NUM_BUCKETS,
                      relative_attention_max_distance=MAX_DISTANCE, dropout_rate=0.0, feed_forward_proj="relu")
    decoder = T5ForConditionalGeneration(config).eval().decoder
    for (ours, ours_ff), block in zip(layers, decoder.block, strict=True):
        theirs, cross, theirs_ff = block.layer
        for part, name in zip(split_weight(ours.qkv.weight, num_heads, 3), "qkv", strict=True):
            getattr(theirs.SelfAttention, name).weight.copy_(part)
        theirs.SelfAttention.o.weight.copy_(ours.out.weight)
        theirs.layer_norm.weight.copy_(ours.norm.weight)
        cross.EncDecAttention.o.weight.zero_()
        theirs_ff.DenseReluDense.wi.weight.copy_(ours_ff.wi.weight)
        theirs_ff.DenseReluDense.wo.weight.copy_(ours_ff.wo.weight)
        theirs_ff.layer_norm.weight.copy_(ours_ff.norm.weight)
    relative = decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    relative.copy_(bias if bias is not None else torch.zeros_like(relative))
    decoder.final_layer_norm.weight.copy_(norm.weight)
    return decoder(inputs_embeds=x, encoder_hidden_states=torch.zeros(len(x), 1, width)).last_hidden_state
