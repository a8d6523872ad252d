"""Generators of other libraries, with our events and semantic IDs: cornac's TIGER and transformers' T5."""

import time
from unittest import mock

import numpy as np
import torch
from cornac.data import SequentialDataset
from cornac.models import LETTER, TIGER
from cornac.models.tiger import recom_tiger
from cornac.models.tiger.tiger import TIGERSeq2Seq
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
)

from recommendation.dataset import Sequences
from recommendation.models.abstract_model import PADDING, Catalogue
from recommendation.models.encoder_decoder.t5 import head_weights
from recommendation.models.layers import split_weight

# B batch, S items of a history, K beams, L levels, V tokens

WARM_UP = 8  # samples in the first step, which is not measured


class StopTraining(Exception):
    """Raised to stop a training loop."""


class Cornac:
    """cornac's TIGER with given codes. Training and search use the code of cornac."""

    def __init__(self, sequences: Sequences, catalogue: Catalogue, disambiguation_level: int | None, sizes: dict):
        self.tiger = TIGER(
            d_model=sizes["d_model"], d_ff=sizes["d_ff"], num_heads=sizes["num_heads"], d_kv=sizes["d_kv"],
            num_enc_layers=sizes["num_encoder_layers"], num_dec_layers=sizes["num_decoder_layers"],
            dropout=sizes["dropout"], max_len=sizes["max_history"], batch_size=sizes["batch_size"], n_epochs=1,
            device="cpu", seed=0)
        self.tiger.device_ = "cpu"  # usually set by `fit`, which would create codes
        train = sequences.split == 0
        events = zip(sequences.user[train], sequences.user[train], sequences.item[train],
                     np.flatnonzero(train), strict=True)
        known = {item: item for item in range(catalogue.num_items)}
        self.tiger.train_set = SequentialDataset.build(list(events), fmt="USIT", global_iid_map=known)
        self.tiger.iid_map = known
        self._set_codes(catalogue.codes.numpy(), catalogue.codebook_sizes, disambiguation_level)

    def _set_codes(self, codes: np.ndarray, codebook_sizes: list[int], disambiguation_level: int | None) -> None:
        """Set the codes. TIGER computes the disambiguation level itself; cornac's LETTER uses the codes as given."""
        tiger, own_level = self.tiger, disambiguation_level is not None
        tiger.rqvae_codebook_size, tiger.rqvae_num_levels = codebook_sizes[0], codes.shape[1] - own_level
        build = TIGER._build_semantic_ids if own_level else LETTER._build_semantic_ids
        build(tiger, codes[:, :tiger.rqvae_num_levels])
        if not np.array_equal(tiger.sid_table, codes) or tiger.level_sizes != codebook_sizes:
            raise SystemExit(f"error: cornac built codes that differ from ours: sizes {tiger.level_sizes}, ours "
                             f"{codebook_sizes}")

    def train(self, num_batches: int) -> tuple[int, float]:
        """Train a new generator for `num_batches` steps of cornac's `fit`.

        Return the number of targets and the seconds.
        """
        num_targets, seconds, own_batches = 0, 0.0, recom_tiger.session_seq_iter

        def batches(*args: object, **options: object):
            nonlocal num_targets, seconds
            batches = own_batches(*args, **options)
            yield tuple(part[:WARM_UP] for part in next(batches))
            begun = time.perf_counter()
            for _ in range(num_batches):
                batch = next(batches)
                num_targets += len(batch[2])
                yield batch
            seconds = time.perf_counter() - begun
            raise StopTraining

        with mock.patch.object(recom_tiger, "session_seq_iter", batches):
            try:
                self.tiger._fit_seq2seq(torch, None)
            except StopTraining:
                return num_targets, seconds
        raise SystemExit("error: cornac's epoch has too few batches. Fix: use a smaller --peer_batches")

    def take_weights(self, model) -> None:
        """Copy the weights of our encoder-decoder. With `train_on: target`, it is the same model as cornac's TIGER."""
        tiger = self.tiger
        own = TIGERSeq2Seq(tiger.level_sizes, tiger.d_model, tiger.d_ff, tiger.num_heads, tiger.d_kv,
                           tiger.num_enc_layers, tiger.num_dec_layers, tiger.dropout).eval()
        with torch.no_grad():
            copy_stacks(model, own)
            own.token_emb.weight.copy_(model.embedding.weight)
            own.bos.copy_(model.embedding.weight[:1])
            for ours, theirs in zip(model.heads, own.heads, strict=True):
                theirs.weight.copy_(ours[:len(theirs.weight)])
        tiger.model, tiger.pad_idx = own, tiger.total_items
        tiger.enc_token_table = np.zeros((tiger.total_items + 1, len(tiger.level_sizes)), dtype="int64")
        tiger.enc_token_table[:-1] = tiger.sid_table + own.offsets.numpy()

    def recommend(self, histories: list[np.ndarray], num_beams: int) -> np.ndarray:
        """Return the items (B, K), best first. As `rank` in cornac does, score one history at a time."""
        self.tiger.n_beams = num_beams
        scores = [self.tiger.score(user, history) for user, history in enumerate(histories)]
        return np.stack([row.argsort(kind="stable")[::-1][:num_beams] for row in scores])


class T5:
    """T5ForConditionalGeneration with the same tokens as our model, and with the usual training and search."""

    def __init__(self, sequences: Sequences, catalogue: Catalogue, sizes: dict):
        self.sequences, self.sizes, self.codebook_sizes = sequences, sizes, catalogue.codebook_sizes
        first_token = 1 + np.cumsum([0, *catalogue.codebook_sizes[:-1]])
        self.tokens = catalogue.codes + torch.from_numpy(first_token)
        self.with_padding = torch.cat([self.tokens, torch.zeros(1, len(first_token), dtype=torch.int64)])
        self.children: dict[tuple, list[int]] = {}
        for row in sorted(self.tokens.tolist()):
            for level, token in enumerate(row):
                after = self.children.setdefault(tuple(row[:level]), [])
                if not after or after[-1] != token:
                    after.append(token)
        self.item_of = {tuple(row): item for item, row in enumerate(self.tokens.tolist())}
        self.model = self._build()

    def _build(self) -> T5ForConditionalGeneration:
        vocabulary, sizes = 1 + sum(self.codebook_sizes), self.sizes
        # There is no end token, because all IDs have the same number of levels.
        return T5ForConditionalGeneration(T5Config(
            vocab_size=vocabulary, d_model=sizes["d_model"], d_kv=sizes["d_kv"], d_ff=sizes["d_ff"],
            num_layers=sizes["num_encoder_layers"], num_decoder_layers=sizes["num_decoder_layers"],
            num_heads=sizes["num_heads"], dropout_rate=sizes["dropout"], feed_forward_proj="relu",
            tie_word_embeddings=False, pad_token_id=0, decoder_start_token_id=0, eos_token_id=None))

    def input_ids(self, items: Tensor) -> Tensor:
        """Return the tokens of items: (B, S), padded at the end -> (B, S * L)."""
        return self.with_padding[items].flatten(1)

    def train(self, num_batches: int) -> tuple[int, float]:
        """Train a new model for `num_batches` steps; return the number of targets and the seconds.

        Every history is padded to the maximum length.
        """
        model, width = self._build().train(), self.sizes["max_history"]
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.sizes["lr"])
        order = np.random.default_rng(0).permutation(self.sequences.positions("train"))

        def step(positions: np.ndarray) -> None:
            items = self.sequences.histories(positions, width).items
            items = torch.nn.functional.pad(items, (0, width - items.shape[1]), value=PADDING)
            input_ids = self.input_ids(items)
            labels = self.tokens[torch.from_numpy(self.sequences.item[positions])]
            optimizer.zero_grad()
            model(input_ids=input_ids, attention_mask=(input_ids != 0).long(), labels=labels).loss.backward()
            optimizer.step()

        step(order[:WARM_UP])
        begun, size = time.perf_counter(), self.sizes["batch_size"]
        for number in range(num_batches):
            step(order[number * size:(number + 1) * size])
        return num_batches * size, time.perf_counter() - begun

    def take_weights(self, model) -> None:
        """Copy the weights of our encoder-decoder with `train_on: target`."""
        self.model.eval()
        with torch.no_grad():
            # transformers 5 ties the head to the embedding, whatever the config says.
            self.model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(self.model.lm_head.weight))
            copy_stacks(model, self.model)
            self.model.shared.weight.copy_(model.embedding.weight)
            self.model.lm_head.weight[1:] = head_weights(model, model.heads)

    def recommend(self, items: Tensor, num_beams: int, per_level: bool = False) -> np.ndarray:
        """Return the items, best first: (B, S) histories -> (B, K).

        With `per_level`, probabilities are normalized over the codes of a level, as in our model and in cornac. T5
        itself normalizes them over all tokens.
        """
        def allowed(_row: int, prefix: Tensor) -> list[int]:
            return self.children[tuple(prefix[1:].tolist())]

        input_ids = self.input_ids(items)
        options: dict = {"prefix_allowed_tokens_fn": allowed}
        if per_level:
            options = {"logits_processor": LogitsProcessorList(
                [self._normalize, PrefixConstrainedLogitsProcessor(allowed, num_beams)])}
        found = self.model.generate(input_ids, attention_mask=(input_ids != 0).long(), num_beams=num_beams,
                                    num_return_sequences=num_beams, do_sample=False, length_penalty=0.0,
                                    max_new_tokens=self.tokens.shape[1], **options)
        rows = [self.item_of[tuple(row)] for row in found[:, 1:].tolist()]
        return np.array(rows).reshape(len(items), num_beams)

    def _normalize(self, prefix: Tensor, scores: Tensor) -> Tensor:
        """Normalize log-probabilities (B * K, V) over the tokens of the next level instead of all tokens."""
        level = prefix.shape[1] - 1
        begin = 1 + sum(self.codebook_sizes[:level])
        return scores - scores[:, begin:begin + self.codebook_sizes[level]].logsumexp(dim=1, keepdim=True)


def copy_stacks(model, theirs) -> None:
    """Copy our encoder and decoder into two T5Stacks."""
    for ours, bias, norm, stack in ((model.encoder, model.encoder_bias, model.encoder_norm, theirs.encoder),
                                    (model.decoder, model.decoder_bias, model.decoder_norm, theirs.decoder)):
        stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.copy_(bias.weight)
        stack.final_layer_norm.weight.copy_(norm.weight)
        for number, (layers, block) in enumerate(zip(ours, stack.block, strict=True)):
            for layer, other in zip(layers, block.layer, strict=True):
                other.layer_norm.weight.copy_(layer.norm.weight)
                copy_layer(layer, other, model.memory, number)


def copy_layer(ours, theirs, memory, number: int) -> None:
    """Copy the weight matrices of a feed-forward, a self-attention or a cross-attention layer.

    memory: our weights of the keys and values of the cross-attention in all layers
    number: number of the layer
    """
    if hasattr(ours, "wi"):
        theirs.DenseReluDense.wi.weight.copy_(ours.wi.weight)
        theirs.DenseReluDense.wo.weight.copy_(ours.wo.weight)
        return
    is_self = hasattr(ours, "qkv")
    other = theirs.SelfAttention if is_self else theirs.EncDecAttention
    if is_self:
        parts = split_weight(ours.qkv.weight, ours.num_heads, 3)
    else:
        of_layers = split_weight(memory.key_value.weight, memory.num_heads, 2 * memory.num_layers)
        parts = [ours.query.weight, *of_layers[2 * number:2 * number + 2]]
    for weight, part in zip((other.q, other.k, other.v), parts, strict=True):
        weight.weight.copy_(part)
    other.o.weight.copy_(ours.out.weight)
