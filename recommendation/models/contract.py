"""The contract with a recommender, checked before training, so that an error names the method that breaks it."""

from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import ConfigError

from .abstract_model import PADDING, AbstractRecommender, Recommendations, Windows

# B batch, k results

NUM_TRIED = 8  # histories that the contract is tried on


def check_contract(model: AbstractRecommender, histories: Windows, top_k: int, windows: Windows | None) -> None:
    """Ask for recommendations after a few histories, and for the loss of a few training windows if there are any.

    A ConfigError names the method that breaks a promise. The modes of the model's modules and the random state are
    left as they were.
    """
    modes = {module: module.training for module in model.modules()}
    device = histories.items.device
    seen = histories.items.sort(dim=1, descending=True).values                 # PADDING is the smallest
    seen = seen.masked_fill(torch.nn.functional.pad(seen[:, 1:] == seen[:, :-1], (1, 0)), PADDING)
    seen = seen.sort(dim=1, descending=True).values
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        with torch.no_grad():
            _check_lists(model, "recommend", lambda: model.recommend(histories, top_k), histories, top_k)
            result = _check_lists(model, "recommend_unseen", lambda: model.recommend_unseen(histories, seen, top_k),
                                  histories, top_k)
        if ((result.items.unsqueeze(2) == seen.unsqueeze(1)) & (seen != PADDING).unsqueeze(1)).any():
            _refuse(model, "recommend_unseen", "listed an item of `seen`", "leave out the items of each row of `seen`")
        if windows is not None:
            losses = model.compute_loss(windows)
            loss = losses.get("loss_total") if isinstance(losses, dict) else losses
            if not isinstance(losses, dict) or not isinstance(loss, Tensor) or loss.ndim:
                _refuse(model, "compute_loss", f"returned {_described(losses)}",
                        'return {"loss_total": a scalar tensor}, and other scalars if you like')
    for module, mode in modes.items():
        module.training = mode


def _check_lists(model: AbstractRecommender, method: str, ask: Callable[[], Recommendations], histories: Windows,
                 top_k: int) -> Recommendations:
    """The answer, once it keeps every promise about lists and is the same with another random seed."""
    answers = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = _random_state(histories)
        answers.append(ask())
        if not torch.equal(before, _random_state(histories)):
            _refuse(model, method, "drew random numbers", "leave out dropout and noise unless `self.training`, or draw "
                    "from a torch.Generator of your own with a fixed seed")
    result, again = answers
    if not (isinstance(result, Recommendations) and isinstance(result.items, Tensor)
            and isinstance(result.scores, Tensor)):
        _refuse(model, method, f"returned {_described(result)}", "return Recommendations(items, scores), as top_items")
    (items, scores), shape = result, (len(histories.items), top_k)
    if items.shape != shape or scores.shape != shape:
        _refuse(model, method, f"returned items {tuple(items.shape)} and scores {tuple(scores.shape)}",
                f"return both of shape (histories, top_k), here {shape}; item -1 with score -inf fills a list")
    if items.is_floating_point() or ((items < PADDING) | (items >= model.catalogue.num_items)).any():
        _refuse(model, method, f"returned items from {items.min().item()} to {items.max().item()} of {items.dtype}",
                f"return integers from 0 to {model.catalogue.num_items - 1}, or -1 for no item")
    if ((items[:, :-1] == PADDING) & (items[:, 1:] != PADDING)).any():
        _refuse(model, method, "returned -1 before an item", "put -1 behind the last item of a list")
    ordered = items.sort(dim=1).values
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PADDING)).any():
        _refuse(model, method, "listed an item twice", "list each item once")
    if (scores[:, 1:] > scores[:, :-1]).any():
        _refuse(model, method, "returned scores that are not in descending order", "put the best item first")
    if not (torch.equal(items, again.items) and torch.allclose(scores, again.scores, equal_nan=True)):
        _refuse(model, method, "gave two answers to one question", "let the answer depend on the history alone")
    return result


def _random_state(histories: Windows) -> Tensor:
    """Of the CPU, or of the GPU that has the histories."""
    device = histories.items.device
    return torch.cat([torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])])


def _refuse(model: AbstractRecommender, method: str, what: str, fix: str) -> None:
    raise ConfigError(f"{type(model).__module__}.{type(model).__name__}.{method}", what, fix=fix)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_described(of_key)}" for key, of_key in value.items()) + "}"
    return f"a {type(value).__name__}"
