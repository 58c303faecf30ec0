import itertools
import math

import pytest
import torch

from logitproc.heads import Floors, Statistics, kmeans, tie_floor, tie_floor_min

from .conftest import calibration


def skewed(n=40, seed=0):
    p = torch.rand(n, generator=torch.Generator().manual_seed(seed)).pow(6) + 1e-4
    return p / p.sum()


def test_worked_example():
    # Tokens 0 and 1 share a code: half of the text pays ln 2.
    assert tie_floor(torch.tensor([0.25, 0.25, 0.5]), torch.tensor([0, 0, 1])) == pytest.approx(
        math.log(2) / 2
    )


@pytest.mark.parametrize("codes", range(1, 7))
def test_no_partition_is_below_the_minimum(codes):
    p = skewed(6)
    partitions = (m for m in itertools.product(range(codes), repeat=6) if len(set(m)) == codes)
    best = min(tie_floor(p, torch.tensor(m)) for m in partitions)
    assert tie_floor_min(p, codes) <= best + 1e-12


def test_the_minimum_is_reached_where_groups_of_equal_mass_exist():
    # L = .15: two singletons, and two pairs of mass .15 each.
    p = torch.tensor([0.4, 0.3, 0.075, 0.075, 0.075, 0.075], dtype=torch.float64)
    assert tie_floor_min(p, 4) == pytest.approx(tie_floor(p, torch.tensor([0, 1, 2, 2, 3, 3])))


def test_the_minimum_is_below_random_and_kmeans_mappings():
    p = skewed()
    random = torch.Generator().manual_seed(0)
    clusters = kmeans(torch.randn(40, 3, generator=random), p, 9, random)
    for mapping in (clusters, torch.randint(0, 9, (40,), generator=random)):
        mapping[:9] = torch.arange(9)
        assert 0 < tie_floor_min(p, 9) < tie_floor(p, mapping)


def test_it_falls_with_the_codes_down_to_zero():
    floors = [tie_floor_min(skewed(), codes) for codes in range(1, 41)]
    assert floors == sorted(floors, reverse=True)
    assert floors[-1] == 0 < floors[-2]
    assert floors[0] == pytest.approx(-float((skewed() * skewed().log()).sum()), rel=1e-5)


def test_uniform_tokens_in_equal_codes():
    assert tie_floor_min(torch.full((60,), 1 / 60), 12) == pytest.approx(math.log(5), rel=1e-6)


def test_tokens_that_never_occur_cost_nothing():
    assert tie_floor_min(torch.tensor([0.5, 0.5, 0.0, 0.0]), 3) == 0


@pytest.mark.parametrize("codes", [0, -1, 1.5, True])
def test_no_codes_are_refused(codes):
    with pytest.raises(ValueError, match="at least 1"):
        tie_floor_min(skewed(), codes)


def test_more_codes_than_tokens_are_refused():
    with pytest.raises(ValueError, match="41 codes are more than the 40 tokens"):
        tie_floor_min(skewed(), 41)


def test_the_loss_and_the_divergence_of_a_head_decompose_exactly():
    """CE = CE_cluster + E[ln n], and with the best bias KL(dense || head) = E KL(P || Q) + I(V; H | K)."""
    cal = calibration(dtype=torch.float64)
    statistics = Statistics.of(cal)
    mapping = torch.randint(0, 9, (61,), generator=torch.Generator().manual_seed(0))
    mapping[:9] = torch.arange(9)
    floors = Floors.of(cal, statistics, mapping)
    onehot = torch.nn.functional.one_hot(mapping, 9).double()
    codes = torch.randn(9, 12, generator=torch.Generator().manual_seed(1)).double()
    log_cluster = (cal.states @ codes.T + onehot.sum(0).log()).log_softmax(-1)
    plain = (cal.states @ codes.T)[:, mapping].log_softmax(-1)
    ce = -plain.gather(1, cal.labels[:, None]).mean()
    ce_cluster = -log_cluster.gather(1, mapping[cal.labels][:, None]).mean()
    assert float(ce - ce_cluster) == pytest.approx(floors.floor_labels, abs=1e-10)

    log_p = (cal.states @ cal.weight.T).log_softmax(-1)
    p, dense_cluster = log_p.exp(), log_p.exp() @ onehot
    pbar = statistics.probability
    log_pi = (pbar / (onehot.T @ pbar)[mapping]).log()
    kl = (p * (log_p - log_cluster[:, mapping] - log_pi)).sum(-1).mean()
    kl_cluster = (dense_cluster * (dense_cluster.log() - log_cluster)).sum(-1).mean()
    assert float(kl - kl_cluster) == pytest.approx(floors.information, abs=1e-10)
    plain_kl = (p * (log_p - plain)).sum(-1).mean()
    uniform = float((pbar * (log_pi + onehot.sum(0)[mapping].log())).sum())  # E KL(pi || uniform)
    assert float(plain_kl - kl) == pytest.approx(uniform, abs=1e-8)


def test_two_texts_add_up_to_one():
    cal = calibration(dtype=torch.float64)
    first, second = cal.split(0.3)
    both, whole = Statistics.of(first) + Statistics.of(second), Statistics.of(cal)
    for key in Statistics.__dataclass_fields__:
        torch.testing.assert_close(getattr(both, key), getattr(whole, key))


def test_the_root_gives_the_variance_of_a_logit_error():
    cal = calibration(dtype=torch.float64)
    error = torch.randn(12, generator=torch.Generator().manual_seed(0)).double()
    variance = (cal.states @ error).var(correction=0)
    torch.testing.assert_close(
        (Statistics.of(cal).root.T @ error).square().sum(), variance, rtol=1e-4, atol=0
    )
