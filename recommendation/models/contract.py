"""Check that a recommender follows the contract of `AbstractRecommender`. An error names the wrong method."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigError

from .abstract_model import PADDING, AbstractRecommender, Recommendations, Windows

NUM_TRIED = 8  # the check uses this number of histories and this number of training windows


def check_contract(model: AbstractRecommender, histories: Windows, top_k: int, windows: Windows | None) -> None:
    """Check the recommendations and the loss of a model.

    histories: input of `recommend` and `recommend_unseen`, or of `score_items`
    windows: input of `compute_loss`, or None to skip the loss

    Raises ConfigError if a method returns a wrong result. The error names the method. The check changes neither the
    random state nor the mode (training or evaluation) of the model.
    """
    modes = {module: module.training for module in model.modules()}
    seen = histories.items.sort(dim=1, descending=True).values                 # puts PADDING (-1) at the end
    seen = seen.masked_fill(F.pad(seen[:, 1:] == seen[:, :-1], (1, 0)), PADDING).sort(dim=1, descending=True).values
    device = histories.items.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()
        with torch.no_grad():
            _check_scores(model, histories)
            _check_lists(model, "recommend", lambda: model.recommend(histories, top_k), histories, top_k)
            items = _check_lists(model, "recommend_unseen", lambda: model.recommend_unseen(histories, seen, top_k),
                                 histories, top_k)
        if ((items.unsqueeze(2) == seen.unsqueeze(1)) & (items != PADDING).unsqueeze(2)).any():
            _refuse(model, "recommend_unseen", "returned a seen item", "return only items that are not in `seen`")
        losses = {"loss_total": torch.zeros(())} if windows is None else model.compute_loss(windows)
        loss = losses.get("loss_total") if isinstance(losses, dict) else None
        if not isinstance(loss, Tensor) or loss.ndim:
            _refuse(model, "compute_loss", f"returned a wrong value: {_described(losses)}",
                    'return {"loss_total": <a scalar tensor>}')
        if windows is not None and windows.teacher is not None and not windows.teacher.num_calls:
            _refuse(model, "compute_loss", "does not use the teacher",
                    "take the targets from windows.next_items() or windows.split_last(), or use --teacher none")
    for module, mode in modes.items():
        module.training = mode


def check_types(model: AbstractRecommender, types: dict[str, torch.dtype]) -> None:
    """Raise ConfigError if `fit` has changed the dtype of a tensor of the model. Its checkpoint cannot be loaded again.

    types: the type of each tensor in the state of the model before `fit`
    """
    for name, tensor in model.state_dict().items():
        if tensor.dtype != types.get(name, tensor.dtype):
            _refuse(model, "fit", f"changed the type of {name} from {types[name]} to {tensor.dtype}",
                    f"register {name} with dtype={tensor.dtype}, or convert it in fit")


def _check_scores(model: AbstractRecommender, histories: Windows) -> None:
    """Check the scores of a model whose lists come from `score_items`. Raises ConfigError if they are wrong."""
    if type(model).recommend is not AbstractRecommender.recommend:
        return
    if type(model).score_items is AbstractRecommender.score_items:
        _refuse(model, "score_items", "is missing, and so is `recommend`", "implement `score_items` or `recommend`")
    scores, shape = model.score_items(histories), (len(histories.items), model.catalogue.num_items)
    if not isinstance(scores, Tensor) or scores.shape != shape:
        _refuse(model, "score_items", f"returned a wrong value: {_described(scores)}",
                f"return a tensor with one score per history and item, of shape (histories, items) = {shape}")


def _check_lists(model: AbstractRecommender, method: str, call: Callable[[], Recommendations], histories: Windows,
                 top_k: int) -> Tensor:
    """Check the recommendations that `call` returns, and return their items.

    Raises ConfigError if the recommendations are wrong, or if they depend on random numbers.
    """
    device, results = histories.items.device, []
    for seed in (0, 1):
        torch.manual_seed(seed)
        get_state = torch.cuda.get_rng_state if device.type == "cuda" else torch.get_rng_state
        before = [torch.get_rng_state(), get_state()]
        results.append(call())
        if not all(map(torch.equal, before, [torch.get_rng_state(), get_state()])):
            _refuse(model, method, "used the global random number generator",
                    "use no random numbers, or a torch.Generator with a fixed seed")
    result, num_items, shape = results[0], model.catalogue.num_items, (len(histories.items), top_k)
    if not isinstance(result, Recommendations) or any(not isinstance(p, Tensor) or p.shape != shape for p in result):
        _refuse(model, method, f"returned a wrong value: {_described(result)}",
                f"return Recommendations(items, scores), each of shape (histories, top_k) = {shape}, and fill empty "
                "positions with item -1")
    items, scores = result
    ordered, present = items.sort(dim=1).values, items != PADDING
    for broken, what, fix in (
            (items.is_floating_point() or ((items < PADDING) | (items >= num_items)).any(), "returned invalid items "
             f"(the smallest is {items.min().item()}, the largest is {items.max().item()})",
             f"return integers from 0 to {num_items - 1}, or -1 for an empty position"),
            ((~present[:, :-1] & present[:, 1:]).any(), "returned -1 before an item", "put -1 after the last item"),
            (((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PADDING)).any(), "listed an item twice",
             "list each item once"),
            ((scores[:, 1:] > scores[:, :-1]).any(), "returned scores that are not in descending order",
             "put the item with the best score first"),
            (not torch.equal(items, results[1].items) or not torch.allclose(scores, results[1].scores, equal_nan=True),
             "returned different results for the same histories", "make the result depend only on the histories")):
        if broken:
            _refuse(model, method, what, fix)
    return items


def _refuse(model: AbstractRecommender, method: str, what: str, fix: str) -> None:
    raise ConfigError(f"{type(model).__module__}.{type(model).__name__}.{method}", what, fix=fix)


def _described(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_described(of_key)}" for key, of_key in value.items()) + "}"
    parts = f"({', '.join(map(_described, value))})" if isinstance(value, tuple) else ""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__ + parts
