"""The device that is not there notices what would make a host wait, and nothing else; a chain of all methods there."""

import pytest
import test_contract as contract
import torch
from conftest import WIDTH
from elsewhere import DEVICE, Device, There, Waits, moved
from torch.utils._pytree import tree_map_only

import logitproc as lp

HERE = torch.tensor([[3.0, -1.0, 2.0], [0.5, 4.0, -2.0]])
WAITS = {
    "item": lambda x: x.max().item(),
    "bool": lambda x: bool((x > 0).all()),
    "if": lambda x: 1 if x.isnan().any() else 0,
    "int": lambda x: torch.zeros(int(x.argmax())),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: (x > 0).nonzero(),
    "a mask": lambda x: x[x > 0],
    "values through a mask": lambda x: x.clone().index_put_((x > 0,), x[0].sum().expand(4)),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x[0].repeat_interleave((x[0] > 0).long()),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: HERE.to(x.device),
    "a constant": lambda x: torch.tensor([1.0, 2.0, 3.0], device=x.device),
    "a new constant": lambda x: x.new_tensor([1.0, 2.0, 3.0]),
    "both": lambda x: x + HERE,
    "an index of the host": lambda x: x[torch.tensor([0])],
    "copied into": lambda x: x.clone().copy_(HERE),
}
RUNS = {
    "arithmetic": lambda x: (x + 1) * x.softmax(-1) / 2,
    "in place": lambda x: x.clone().add_(1).exp_(),
    "into a result": lambda x: torch.add(x, 1, out=torch.empty_like(x)),
    "views": lambda x: x[:, 1:].T[None].flatten(0, 1),
    "made there": lambda x: torch.arange(3, device=x.device) + x,
    "a number": lambda x: torch.where(x > 0, x, -torch.inf).masked_fill(x > 3, 0.0),
    "a number through a mask": lambda x: x.clone().index_put_((x > 0,), x.sum()),
    "gather": lambda x: x.gather(1, x.argmax(-1, keepdim=True)),
    "indices": lambda x: x[x.argmax(-1)],
    "repeated": lambda x: x.repeat_interleave(3, dim=0),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_an_error(name):
    with Device():
        x = HERE.to(DEVICE)
    with Device(strict=True), pytest.raises(Waits):
        WAITS[name](x)


@pytest.mark.parametrize("name", RUNS)
def test_what_does_not_wait_runs_there_and_gives_the_same(name):
    with Device():
        x = HERE.to(DEVICE)
    with Device(strict=True):
        found = RUNS[name](x)
    assert isinstance(found, There) and found.device.type == "meta"
    assert torch.equal(found.here, RUNS[name](HERE))


def test_a_chain_of_every_method_gives_the_same_there_and_never_waits(monkeypatch):
    for module in ("companion", "evidence"):
        monkeypatch.setattr(f"logitproc.{module}.read_later", lambda bit: lambda: bool(bit.here))
    given = contract.texts_that_grow()
    with Device():
        made = contract.moves(lp.Chain([lp.get(name).example(WIDTH) for name in lp.names()]), moved)
        there = contract.sampled(made, *(part.to(DEVICE) for part in given), lambda: Device(strict=True))
    monkeypatch.undo()
    here = contract.sampled(lp.Chain([lp.get(name).example(WIDTH) for name in lp.names()]), *given)
    for found, expected in zip(there, here, strict=True):
        torch.testing.assert_close(found.here, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture
def launched(monkeypatch) -> set[str]:
    """The names of the operations that ran as kernels for a GPU, by Triton's interpreter, on tensors of the device."""
    if torch.cuda.is_available():
        pytest.skip("the tests marked gpu run the kernels themselves")
    pytest.importorskip("triton")
    from triton.runtime.interpreter import GridExecutor

    from logitproc.ops import dispatch, triton

    names, launch = set[str](), GridExecutor.__call__

    def kernel(chosen, name, like):
        if not isinstance(like, There) or name not in triton.__all__:
            return None
        names.add(name)
        return getattr(triton, name)

    def launch_here(self, *given, **more):
        here = lambda value: value.here if isinstance(value, There) else value
        return launch(self, *map(here, given), **{key: here(value) for key, value in more.items()})

    monkeypatch.setattr(dispatch, "_kernel", kernel)
    monkeypatch.setattr(GridExecutor, "__call__", launch_here)
    return names


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")
def test_kernels_for_a_gpu_give_the_same_there_and_their_callers_never_wait(launched):
    def both(processor: lp.Processor, history, scores, generated, said, evidence) -> list[torch.Tensor]:
        done = [processor.apply(history, scores, generated, said, evidence)]
        if processor.evidence_size:
            done.append(processor.evidence(history[:, -1].clamp(min=0), scores, *said))
        return [part for part in done if part is not None]

    for subject in contract.subjects():
        given = contract.static_inputs(subject, seed=0)
        expected, processor = both(subject.make(), *given), subject.make()
        with Device():
            there = tree_map_only(torch.Tensor, lambda t: t.to(DEVICE), given)
            both(processor, *there)  # the first call may copy tables
            with Device(strict=True):
                found = both(processor, *there)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.here, other, rtol=1e-4, atol=1e-4, msg=str(subject))
    by_steps = "add_ngrams extrapolated fuse_one log_likelihoods loop_guard lower_phrases mixture"
    assert launched >= set(by_steps.split())
