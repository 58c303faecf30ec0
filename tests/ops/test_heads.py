"""Kernels of output heads against their definitions in plain torch."""

import pytest
import torch

from logitproc import ops
from logitproc.heads.vq import spread
from logitproc.methods.vq import share_logits
from logitproc.ops import cpu, dispatch

CUDA = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(CUDA, reason="there is a CUDA device")),  # Triton's interpreter
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, codes, width", [((1,), 1, 1), ((2, 3), 7, 1021), ((2,), 300, 2500), ((0,), 3, 5)])
@pytest.mark.parametrize("device", DEVICES)
def test_spread_is_that_of_plain_torch_bit_for_bit(device, shape, codes, width, dtype):
    pytest.importorskip("triton", reason="the package triton is not installed")
    from logitproc.ops import triton

    random = torch.Generator().manual_seed(0)
    scores = torch.randn(*shape, codes, generator=random).to(device, dtype)
    extra = torch.randn(*shape, width, generator=random).to(device, dtype)
    bias = torch.randn(width, generator=random).to(device)
    bias[0] = -torch.inf
    mapping = torch.randint(0, codes, (2, width), generator=random, dtype=torch.int32).to(device)
    cut = device == "cpu" and dtype == torch.bfloat16  # the interpreter cuts off what it should round
    tolerance = {"rtol": 2**-7, "atol": 0} if cut else {"rtol": 0, "atol": 0}
    for given in ((mapping[:1], None, None), (mapping[:1], bias, None), (mapping, bias, extra), (mapping, None, None)):
        with ops.backend("reference"):
            plain = spread(scores, *given)
        torch.testing.assert_close(triton.spread(scores, *given), plain, **tolerance)
        with ops.backend("triton"):
            torch.testing.assert_close(spread(scores, *given), plain, **tolerance)


@pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, codes, width, threads", [((1,), 1, 1, 1), ((2, 3), 7, 5021, 1), ((3,), 99, 40_001, 3)])
def test_spread_in_cpp_is_that_of_plain_torch_bit_for_bit(shape, codes, width, threads, dtype):
    random = torch.Generator().manual_seed(0)
    scores = 5 * torch.randn(*shape, codes, generator=random).to(dtype)
    scores[..., 0] = torch.nan
    extra = torch.randn(*shape, width, generator=random).to(dtype)
    bias = torch.randn(width, generator=random)
    bias[-1] = -torch.inf
    mapping = torch.randint(0, codes, (2, width), generator=random, dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for given in ((mapping[:1], None, None), (mapping[:1], bias, None), (mapping, bias, extra), (mapping, None)):
            with ops.backend("reference"):
                plain = spread(scores, *given)
            found = spread(scores, *given)
            assert found.dtype is dtype and found.shape == plain.shape
            torch.testing.assert_close(found, plain, rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=["cpu", "triton"])
def kernels(request):
    if reason := dispatch.unavailable(request.param):
        pytest.skip(reason)
    with ops.backend(request.param):
        yield


@pytest.mark.parametrize("wanted", ["bias", "extra"])
def test_spread_has_gradients_by_all_it_adds(wanted, kernels):
    added = {"bias": torch.zeros(4), "extra": torch.zeros(2, 4)}
    added[wanted].requires_grad_()
    mapping = torch.tensor([[0, 1, 2, 0]], dtype=torch.int32)
    spread(torch.ones(2, 3), mapping, **added).sum().backward()
    assert torch.equal(added[wanted].grad, torch.full((4,), 2.0) if wanted == "bias" else torch.ones(2, 4))


@pytest.mark.parametrize("key, shape", [("bias", (3,)), ("extra", (2, 3)), ("extra", (3, 20))])
def test_spread_reads_nothing_past_the_end(key, shape, kernels):
    with pytest.raises(RuntimeError, match="must match"):
        spread(torch.ones(2, 5), torch.zeros(1, 20, dtype=torch.int32), **{key: torch.zeros(shape)})


@pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")
def test_a_code_that_there_is_not_is_read_from_nowhere():
    found = cpu.spread(torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 2, -1, 0]], dtype=torch.int32))
    assert found.isnan().tolist() == [[False, True, True, False]]


@pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "rows, codes, tokens, width",
    [(0, 2, 3, 3), (1, 1, 1, 1), (5, 3, 7, 9), (3, 400, 7919, 8000), (1, 1024, 151_936, 151_936)],
)
def test_shared_logits_are_as_close_to_float64_as_plain_torch(rows, codes, tokens, width):
    random = torch.Generator().manual_seed(0)
    scores = 5 * torch.randn(rows, width, generator=random)
    scores[torch.rand(rows, width, generator=random) < 0.3] = -torch.inf
    mapping = torch.randint(0, codes, (tokens,), generator=random, dtype=torch.int32)
    mapping[0] = 0
    weights, bias = torch.rand(tokens, generator=random).mul_(4).floor_(), torch.randn(tokens, generator=random)
    for given in (scores, scores.repeat(1, 2)[:, ::2], scores[:, : tokens // 2 + 1]):
        for arguments in ((mapping, weights, codes), (mapping, weights, codes, bias)):
            found, exact = cpu.share_logits(given, *arguments), share_logits(given.double(), *arguments)
            with ops.backend("reference"):
                plain = share_logits(given, *arguments)
            finite = exact.isfinite()
            assert torch.equal(found[~finite].double(), exact[~finite]) and torch.equal(finite, given.isfinite())
            error = lambda x, exact=exact, finite=finite: (x - exact)[finite].abs().amax().item() if finite.any() else 0
            assert error(found) <= error(plain) + 1e-5
            for i in range(rows):
                assert torch.equal(found[i], cpu.share_logits(given[i : i + 1], *arguments)[0])


@pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")
def test_a_token_that_has_its_code_to_itself_keeps_its_score_bit_for_bit():
    random = torch.Generator().manual_seed(0)
    scores, weights = 30 * torch.randn(2, 6000, generator=random), torch.rand(6000, generator=random) + 1e-3
    scores[:, 3000:] = -torch.inf  # these share the codes of the first 3000
    mapping = torch.arange(3000, dtype=torch.int32).repeat(2)
    assert torch.equal(cpu.share_logits(scores, mapping, weights, 3000), scores)
    scores[:, 3000:], weights[3000:] = 5.0, 0.0
    assert torch.equal(cpu.share_logits(scores, mapping, weights, 3000)[:, :3000], scores[:, :3000])


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_more_logits_than_an_int32_counts():
    width = 151_936
    rows = 2**31 // width + 2
    scores = torch.randn(rows, 5, device="cuda", dtype=torch.bfloat16)
    mapping = torch.randint(0, 5, (1, width), device="cuda", dtype=torch.int32)
    assert torch.equal(spread(scores, mapping)[-1], scores[-1].index_select(0, mapping[0]))
