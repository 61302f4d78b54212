"""The papers' equations, against what nobody here wrote: torch's own losses, closed forms, float64
by hand.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from deepclust.heads.base import Bank, Progress
from deepclust.heads.scan import SCAN, scan_loss
from deepclust.heads.selflabel import confident_targets
from deepclust.heads.simclr import SimCLR, nt_xent


def nt_xent_by_hand(first, second, temperature, one_sided=False):
    """SimCLR, equation 1, sample by sample in float64."""
    z = torch.cat([first, second]).double()
    z = z / z.norm(dim=1, keepdim=True)
    n, total = len(first), []
    for i in range(n if one_sided else 2 * n):
        positive = (i + n) % (2 * n)
        others = sum(math.exp(float(z[i] @ z[j]) / temperature) for j in range(2 * n) if j != i)
        total.append(-math.log(math.exp(float(z[i] @ z[positive]) / temperature) / others))
    return sum(total) / len(total)


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_nt_xent_is_the_papers_equation(one_sided, temperature):
    torch.manual_seed(0)
    first, second = torch.randn(7, 5), torch.randn(7, 5)
    ours = nt_xent(first, second, temperature=temperature, one_sided=one_sided)
    assert float(ours) == pytest.approx(
        nt_xent_by_hand(first, second, temperature, one_sided), rel=1e-5
    )


def test_nt_xent_closed_forms():
    """All embeddings equal: every candidate is as likely, ln(2B - 1). Pairs orthogonal to all
    others: known too.
    """
    same = torch.ones(6, 4)
    assert float(nt_xent(same, same, temperature=0.2)) == pytest.approx(math.log(11), rel=1e-6)
    eye = torch.eye(6)
    expected = math.log(math.exp(1 / 0.5) + 10) - 1 / 0.5
    assert float(nt_xent(eye, eye, temperature=0.5)) == pytest.approx(expected, rel=1e-6)


def test_nt_xent_does_not_see_scale_or_order():
    torch.manual_seed(0)
    first, second, order = torch.randn(8, 5), torch.randn(8, 5), torch.randperm(8)
    base = nt_xent(first, second)
    torch.testing.assert_close(nt_xent(3 * first, 0.1 * second), base)
    torch.testing.assert_close(nt_xent(second, first), base)
    torch.testing.assert_close(nt_xent(first[order], second[order]), base)


def test_scan_loss_is_the_papers_equation():
    torch.manual_seed(0)
    anchors, neighbors = torch.randn(9, 4), torch.randn(9, 4)
    p, q = anchors.double().softmax(1), neighbors.double().softmax(1)
    consistency = -(p * q).sum(1).log().mean()
    entropy = torch.distributions.Categorical(probs=p.mean(0)).entropy()
    loss, ours, spread = scan_loss(anchors, neighbors, entropy_weight=5.0)
    assert float(ours) == pytest.approx(float(consistency), rel=1e-5)
    assert float(spread) == pytest.approx(float(entropy), rel=1e-5)
    assert float(loss) == pytest.approx(float(consistency - 5 * entropy), rel=1e-5)


def test_scan_loss_closed_forms():
    """Equal, balanced one-hot predictions: consistency 0 and entropy ln K. Uniform ones: both ln K."""
    sure = 200 * torch.eye(4).repeat(3, 1)
    loss, consistency, entropy = scan_loss(sure, sure, entropy_weight=2.0)
    assert float(consistency) == pytest.approx(0, abs=1e-6) and float(entropy) == pytest.approx(
        math.log(4), rel=1e-5
    )
    loss, consistency, entropy = scan_loss(torch.zeros(8, 4), torch.zeros(8, 4), entropy_weight=1.0)
    assert float(consistency) == pytest.approx(math.log(4)) and float(loss) == pytest.approx(
        0, abs=1e-6
    )


def test_scan_loss_stays_finite_where_a_product_underflows():
    opposite = 300 * torch.eye(2)
    loss, consistency, _ = scan_loss(opposite.requires_grad_(), 300 * torch.eye(2).flip(0))
    assert float(consistency.detach()) == pytest.approx(100.0)
    loss.backward()
    assert torch.isfinite(opposite.grad).all()


def test_confident_targets_are_the_balanced_cross_entropy_of_the_paper():
    """Weight (#selected) / (#selected of the class), weighted mean: torch's own weighted cross
    entropy.
    """
    torch.manual_seed(0)
    logits, student = 4 * torch.randn(200, 5), torch.randn(200, 5)
    labels, weights = confident_targets(logits, threshold=0.8)
    chosen = logits.softmax(1).max(1).values > 0.8
    counts = torch.bincount(logits.argmax(1)[chosen], minlength=5)
    assert torch.equal(weights > 0, chosen) and (counts > 0).all()
    reference = F.cross_entropy(
        student[chosen], logits.argmax(1)[chosen], weight=chosen.sum() / counts
    )
    ours = (F.cross_entropy(student, labels, reduction="none") * weights).mean()
    torch.testing.assert_close(ours, reference)
    labels, weights = confident_targets(logits, threshold=0.8, balance=False)
    torch.testing.assert_close(
        (F.cross_entropy(student, labels, reduction="none") * weights).mean(),
        F.cross_entropy(student[chosen], labels[chosen]),
    )


def test_a_quota_takes_the_surest_share_of_each_cluster():
    torch.manual_seed(0)
    logits = torch.randn(300, 3) * torch.tensor([6.0, 1.0, 0.3])
    confidence, labels = logits.softmax(1).max(1)
    _, weights = confident_targets(logits, quota=0.5)
    for cluster in range(3):
        members = labels == cluster
        chosen = members & (weights > 0)
        assert int(chosen.sum()) == round(0.5 * int(members.sum()))
        assert confidence[chosen].min() >= confidence[members & (weights == 0)].max()
        assert float(weights[chosen].sum()) == pytest.approx(100, rel=1e-5), (
            "each cluster weighs the same"
        )


def test_nobody_confident_is_a_loss_of_zero():
    _, weights = confident_targets(torch.randn(10, 4), threshold=1.0)
    assert (weights == 0).all() and torch.isfinite(weights).all()


def test_scan_finds_the_nearest_neighbours_and_chooses_the_better_sub_head():
    """Two far groups: neighbours stay inside; the sub-head that splits the groups scores lower than
    a random one.
    """
    torch.manual_seed(0)
    features = torch.cat([torch.randn(20, 8) + 8, torch.randn(20, 8) - 8])
    head = SCAN(8, 2, 40, num_heads=2, num_neighbors=5, init="random")
    bank = Bank(features, torch.arange(40), 40)
    partners = head.refresh(bank).partners
    assert partners.shape == (40, 6) and torch.equal(partners[:, 0], torch.arange(40))
    assert (partners[:20] < 20).all() and (partners[20:] >= 20).all()
    with torch.no_grad():
        head.layer.weight.zero_()
        head.layer.bias.zero_()
        head.layer.weight[2] = 1.0
        head.layer.weight[3] = -1.0
    scores = head.score(bank)
    assert int(scores.argmin()) == 1
    assert float(scores[1]) == pytest.approx(-math.log(2), abs=1e-3), "consistency 0, entropy ln 2"
    assert float(scores[0]) == pytest.approx(0.0, abs=1e-3), "consistency ln 2, entropy ln 2"


def test_kmeans_initialisation_is_the_kmeans_clustering():
    torch.manual_seed(0)
    centres = 6 * torch.randn(4, 8)
    truth = torch.arange(4).repeat(30)
    features = centres[truth] + torch.randn(120, 8)
    for kind in ("cosine", "linear"):
        head = SCAN(8, 4, 120, kind=kind, init="kmeans")
        head.init_prototypes(Bank(features, torch.arange(120), 120))
        found = head.predict(features).argmax(1)
        pairs = {(int(a), int(b)) for a, b in zip(found, truth)}
        assert len(pairs) == 4, kind


def test_neighbours_may_be_mined_on_the_pretexts_embedding():
    """Features say one thing, the projector keeps another: the switch decides which neighbours are
    found.
    """
    torch.manual_seed(0)
    left_right, up_down = torch.arange(40) % 2 * 2.0 - 1, torch.arange(40) // 20 * 2.0 - 1
    features = torch.stack([10 * left_right, up_down], dim=1) + 0.01 * torch.randn(40, 2)
    pretext = SimCLR(2, hidden_dim=2, embedding_dim=2, batch_norm=False)
    pretext.projector = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        pretext.projector.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.001]]))
    for mine_on, group in (("z", left_right), ("embedding", up_down)):
        head = SCAN(2, 2, 40, num_neighbors=5, mine_on=mine_on)
        head.init_from(pretext)
        with torch.no_grad():
            partners = head.refresh(Bank(features, torch.arange(40), 40)).partners
        assert (group[partners] == group[:, None]).all(), mine_on


def test_a_pretext_asks_for_neighbours_late_and_once_a_pass():
    head = SimCLR(4, neighbors_from=0.5, num_neighbors=3)
    due = [
        step
        for step in range(20)
        if head.bank_due(Progress(step, 20, step // 5, 4, 0, 0)) is not None
    ]
    assert due == [10, 15]
    assert SimCLR(4).bank_due(Progress(10, 20, 2, 4, 0, 0)) is None
    partners = head.refresh(Bank(torch.randn(12, 4), torch.arange(1, 13), 13)).partners
    assert partners.shape == (13, 4) and torch.equal(partners[:, 0], torch.arange(13)), (
        "itself comes first"
    )
    assert (partners[0] == 0).all(), "an image that could not be read is its own neighbour"
    assert all(len(set(row.tolist())) == 4 for row in partners[1:])
