import itertools

import pytest
import torch

from logitproc.heads.clustering import assign, fill_empty, kmeans, means


def points(n=300, d=5, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=random).to(dtype), torch.rand(n, generator=random) + 0.01


def fitted(x, w, codes, seed=0, **kwargs):
    return kmeans(x, w, codes, torch.Generator().manual_seed(seed), tolerance=0.0, passes=60, **kwargs)


def test_the_objective_never_grows_and_no_code_is_empty():
    x, w = points()
    seen = []
    labels = fitted(x, w, 20, report=seen.append)
    objectives = [event.figures["objective"] for event in seen]
    assert len(objectives) > 3
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(objectives))
    assert torch.bincount(labels, minlength=20).min() > 0


def test_at_the_end_every_row_is_at_the_mean_nearest_to_it():
    x, w = points(dtype=torch.float64)
    labels = fitted(x, w, 12)
    nearest, distance = assign(x, means(x, w, labels, 12))
    assert torch.equal(nearest, labels)
    torch.testing.assert_close(distance, (x - means(x, w, labels, 12)[labels]).square().sum(1))


def test_the_same_seed_gives_the_same_labels_and_another_seed_others():
    x, w = points()
    assert torch.equal(fitted(x, w, 15), fitted(x, w, 15))
    assert not torch.equal(fitted(x, w, 15), fitted(x, w, 15, seed=1))


def test_in_float64_the_size_of_a_tile_changes_nothing():
    x, w = points(dtype=torch.float64)
    assert torch.equal(fitted(x, w, 15, tile=15 * 7), fitted(x, w, 15))


def test_a_row_between_two_codes_goes_to_the_lower_one():
    labels, distance = assign(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [-1.0], [3.0]]))
    assert labels.tolist() == [0, 0]
    assert distance.tolist() == [1.0, 1.0]


def test_empty_codes_get_the_rows_of_largest_error_and_leave_none_behind():
    # Code 0 has rows 0, 1, 2 with errors 1, 5, 3; codes 1 and 2 have none.
    labels, filled = fill_empty(torch.tensor([0, 0, 0]), torch.tensor([1.0, 5.0, 3.0]), 3)
    assert (labels.tolist(), filled) == ([0, 1, 2], 2)


@pytest.mark.parametrize("codes", [2, 7])
def test_equal_rows_still_fill_every_code(codes):
    labels = fitted(torch.ones(9, 3), torch.ones(9), codes)
    assert torch.bincount(labels, minlength=codes).min() > 0


def test_the_mean_of_a_code_is_weighted_and_that_of_one_row_is_the_row():
    # (1 * 1 + 3 * 5) / 4 = 4
    rows = torch.tensor([[1.0], [5.0], [0.1]])
    found = means(rows, torch.tensor([1.0, 3.0, 0.3]), torch.tensor([0, 0, 1]), 2)
    assert found[0].item() == 4
    assert found[1].float() == rows[2]
