"""LETTER: its two losses worked out by hand, groups and partners."""

import math

import pytest
import torch

from common.errors import ConfigError
from quantization.models.letter import LETTER, _partners
from tests.errors import refused
from tests.quantization.conftest import WIDTH, seeded


@pytest.fixture
def make(make_config, make_model):
    def make(num_items: int = 40, **own):
        return make_model(make_config("letter", **own), num_items)

    return make


@pytest.fixture
def tiny(make):
    """A model that compares its latents, two wide, with the collaborative vectors directly."""
    model = make(latent_size=2)
    model.to_collaborative = torch.nn.Identity()
    return model


def softmax_loss(*logits: float) -> float:
    """The cross-entropy of the first logit."""
    return -math.log(math.exp(logits[0]) / sum(map(math.exp, logits)))


def test_the_alignment_of_two_items_by_hand(tiny):
    latent, collaborative = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[0.5, 0.5], [1.0, -1.0]])
    # Products of the first item's latent with both vectors: 1.5 and -1; of the second's: 1 and 4.
    by_hand = (softmax_loss(1.5, -1.0) + softmax_loss(4.0, 1.0)) / 2
    assert tiny.alignment_loss(latent, collaborative).item() == pytest.approx(by_hand, rel=1e-5)


def test_items_without_a_collaborative_vector_do_not_count(tiny):
    latent, collaborative = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[0.5, 0.5], [1.0, -1.0]])
    alone = tiny.alignment_loss(latent, collaborative)
    latent = torch.cat([latent, torch.tensor([[9.0, 9.0]])]).requires_grad_()
    loss = tiny.alignment_loss(latent, torch.cat([collaborative, torch.zeros(1, 2)]))
    loss.backward()
    assert loss.item() == pytest.approx(alone.item())
    assert latent.grad.isfinite().all()
    assert latent.grad[2].tolist() == [0.0, 0.0]


def test_no_item_with_a_collaborative_vector_means_no_alignment(tiny):
    latent = torch.randn(3, 2, requires_grad=True)
    loss = tiny.alignment_loss(latent, torch.zeros(3, 2))
    loss.backward()
    assert loss.item() == 0.0
    assert latent.grad.tolist() == [[0.0, 0.0]] * 3


@pytest.fixture
def grouped(make):
    """One level of four codewords in the groups {0, 1} and {2, 3}."""
    model = make(num_levels=1, codebook_size=4, latent_size=2)
    model.groups.copy_(torch.tensor([[0, 0, 1, 1]]))
    return model


def test_the_diversity_of_a_codeword_by_hand(grouped):
    with torch.no_grad():
        grouped.quantizer.codebooks[0].codewords.copy_(torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0], [-1.0, 1.0]]))
    # Products with the first codeword: 2, 0 and -1, its partner's first; with the last: 3, -1 and -1.
    assert grouped.diversity_loss(torch.tensor([[0]])).item() == pytest.approx(softmax_loss(2, 0, -1), rel=1e-5)
    both = (softmax_loss(2, 0, -1) + softmax_loss(3, -1, -1)) / 2
    assert grouped.diversity_loss(torch.tensor([[0], [3]])).item() == pytest.approx(both, rel=1e-5)


def test_diversity_prefers_the_partner(grouped):
    near, far = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), [0, 2, 1, 3]
    losses = []
    for codewords in (near, near[far]):
        with torch.no_grad():
            grouped.quantizer.codebooks[0].codewords.copy_(codewords)
        losses.append(grouped.diversity_loss(torch.tensor([[0], [1], [2], [3]])).item())
    assert losses[0] < losses[1]


def test_a_codeword_alone_in_its_group_has_no_loss(grouped):
    grouped.groups.copy_(torch.tensor([[0, 1, 1, 1]]))
    loss = grouped.diversity_loss(torch.tensor([[0]]))
    loss.backward()
    assert loss.item() == 0.0
    assert grouped.quantizer.codebooks[0].codewords.grad.isfinite().all()


def test_partners_are_all_others_of_the_same_group():
    groups = torch.tensor([2, 0, 1, 0, 2, 0, 2, 2, 0])
    torch.manual_seed(0)
    found = [set() for _ in groups]
    for _ in range(200):
        partner, alone = _partners(groups)
        assert alone.tolist() == [False, False, True] + [False] * 6
        for codeword, other in enumerate(partner.tolist()):
            found[codeword].add(other)
    for codeword, others in enumerate(found):
        same = {other for other in range(9) if groups[other] == groups[codeword]}
        assert others == (same - {codeword} or {codeword})  # `alone` marks a codeword without others


@pytest.mark.parametrize(("num_items", "size", "num_groups"), [(40, 40, 4), (100, 64, 8), (40, 6, 2), (40, 5, 1)])
def test_groups_are_equally_large(make, num_items, size, num_groups):
    model = make(num_items, num_levels=1, codebook_size=size, num_groups=num_groups, group_iterations=10)
    items = torch.randn(num_items, 2 * WIDTH, generator=seeded(1))
    model.initialize(items, seeded())
    assert torch.bincount(model.groups[0]).max() <= -(-size // num_groups)


def test_codewords_are_regrouped_after_every_epoch(make):
    model = make(num_levels=1, codebook_size=4, num_groups=2, restart_dead="false")
    items = torch.randn(40, 2 * WIDTH, generator=seeded(1))
    with torch.no_grad():
        model.quantizer.codebooks[0].codewords[:, 0] = torch.tensor([5.0, -5.0, 5.0, -5.0])
    model.groups[0] = torch.tensor([0, 0, 1, 1])
    model.maintain(items, seeded())
    assert model.groups[0].tolist() == [0, 0, 1, 1]
    model.end_epoch(items, seeded())
    assert model.groups[0].tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])


def test_the_quantization_loss_weighs_alignment_and_diversity(make):
    items = torch.randn(40, 2 * WIDTH, generator=seeded(1))
    losses = {}
    for weights in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (2.0, 3.0)):
        model = make(alignment_weight=weights[0], diversity_weight=weights[1], sinkhorn_levels="[]")
        model.initialize(items, seeded())
        torch.manual_seed(0)
        losses[weights] = model(items)[1].item()
    alignment, diversity = losses[1.0, 0.0] - losses[0.0, 0.0], losses[0.0, 1.0] - losses[0.0, 0.0]
    assert alignment > 0.1
    assert diversity > 0.1
    assert losses[2.0, 3.0] == pytest.approx(losses[0.0, 0.0] + 2 * alignment + 3 * diversity, rel=1e-3)


def test_only_the_content_is_reconstructed_and_coded(make):
    model = make()
    items = torch.randn(40, 2 * WIDTH, generator=seeded(1))
    model.initialize(items, seeded())
    model.eval()
    others = items.clone()
    others[:, WIDTH:] = 0.0
    assert model(items)[0].shape == (40, WIDTH)
    assert torch.equal(model.get_codes(items), model.get_codes(others))
    assert torch.equal(model.target(items), items[:, :WIDTH])


def test_more_groups_than_codewords_are_refused(make):
    with refused(ConfigError, "letter.model_params.num_groups", names=[5, 4], fix=["--num_groups auto", 4]):
        make(codebook_size=4, num_groups=5)


@pytest.mark.parametrize(("size", "num_groups"), [(1, 1), (3, 1), (8, 4), (32, 10)])
def test_the_number_of_groups_follows_the_number_of_codewords(make, size, num_groups):
    assert make(codebook_size=size, num_groups="auto").num_groups == num_groups


@pytest.mark.parametrize("key", ["num_groups", "group_iterations"])
def test_a_count_of_zero_is_refused(make, key):
    with refused(ConfigError, names=[f"letter.model_params.{key}", 0]):
        make(**{key: 0})


def with_collaborative(*suffix: str) -> dict:
    return {"letter": {"model_params": dict(zip(["collaborative"], suffix, strict=False))}}


def test_the_collaborative_embedding_is_read_too():
    assert LETTER.embedding_suffixes(with_collaborative("cf"), "td") == ["td", "cf"]
    assert LETTER.embedding_suffixes(with_collaborative("sasrec"), "td") == ["td", "sasrec"]
    with refused(ConfigError, "--embedding_suffix cf", names=["letter"], fix=["--embedding_suffix td"]):
        LETTER.embedding_suffixes(with_collaborative("cf"), "cf")


@pytest.mark.parametrize(("suffix", "where", "name"), [
    (["../cf"], "letter.model_params.collaborative", "'../cf'"), ([], "letter.model_params", "'collaborative'")])
def test_an_invalid_collaborative_suffix_is_refused(suffix, where, name):
    with refused(ConfigError, where, names=[name]):
        LETTER.embedding_suffixes(with_collaborative(*suffix), "td")
