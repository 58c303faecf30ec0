"""A chain is one processor, and a list of mappings."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conftest import WIDTH

import logitproc as lp
from logitproc import registry
from logitproc.artifact import Artifact
from logitproc.chain import parse_processor


@dataclass  # equal instances on purpose: transformers alone would drop them
class AddLogitsProcessor(lp.Processor):
    """Add a number to one token."""

    amount: float = 1.0
    tokens: tuple[int, ...] = (3,)
    context: ClassVar = 1

    def __post_init__(self):
        self.tokens = tuple(self.tokens)

    def step(self, tokens, scores):
        return scores.index_add(1, torch.tensor(self.tokens), torch.full((len(scores), 1), self.amount))


@dataclass(eq=False)
class ScaleLogitsProcessor(lp.Processor):
    """Multiply all scores, which does not commute with adding."""

    factor: float
    label: str = ""
    supports_continuous_batching: ClassVar = True

    def step(self, tokens, scores):
        return scores * self.factor


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    lp.register("add", paper="https://example.org")(AddLogitsProcessor)
    lp.register("scale", paper="https://example.org")(ScaleLogitsProcessor)


ZEROS = torch.zeros(2, WIDTH)
IDS = torch.tensor([[5, 6], [7, 8]])
SPEC = [{"name": "add", "amount": 2.0}, {"name": "scale", "factor": 10.0}]


def third(chain: lp.Chain) -> float:
    return chain(IDS, ZEROS)[0, 3].item()


# --- one processor ---


def test_processors_run_in_the_order_given():
    add, scale = AddLogitsProcessor(2.0), ScaleLogitsProcessor(10.0)
    assert third(lp.Chain([add, scale])) == 20.0
    assert third(lp.Chain([scale, add])) == 2.0


def test_an_empty_chain_returns_the_scores():
    assert lp.Chain()(IDS, ZEROS) is ZEROS


def test_all_five_of_five_equal_processors_run_in_generate(model):
    same = AddLogitsProcessor(1.0)
    options = {"max_new_tokens": 1, "do_sample": False, "output_scores": True, "output_logits": True,
               "return_dict_in_generate": True, "attention_mask": torch.ones_like(IDS)}  # fmt: skip
    for five in ([same] * 5, [AddLogitsProcessor(1.0) for _ in range(5)]):
        out = model.generate(IDS, logits_processor=[lp.Chain(five)], **options)
        torch.testing.assert_close(out.scores[0][:, 3] - out.logits[0][:, 3], torch.full((2,), 5.0))


@pytest.mark.parametrize("told", [True, False])
def test_generated_comes_where_step_declares_it_unless_the_instance_does_without(told):
    class Counts(lp.Processor):
        def step(self, tokens, scores, *, generated=None):
            return scores if generated is None else scores + generated[:, None]

    processor = Counts()
    assert processor.reads_generated
    processor.reads_generated = told
    out = lp.Chain([processor])(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 3))
    assert out.tolist() == [[4.0 if told else 0.0] * 3]


def test_a_chain_refuses_what_is_no_processor_of_ours():
    with pytest.raises(TypeError, match=r"holds logitproc processors, got function.*\[chain, other\]"):
        lp.Chain([third])


def test_the_context_is_the_longest_and_the_capabilities_are_shared_by_all():
    add, scale = AddLogitsProcessor(), ScaleLogitsProcessor(1.0)
    assert lp.Chain().context == 0
    assert lp.Chain([scale, add]).context == 1
    reads_all = AddLogitsProcessor()
    reads_all.context = None
    assert lp.Chain([add, reads_all]).context is None
    assert lp.Chain([scale]).supports_continuous_batching
    assert not lp.Chain([scale, add]).supports_continuous_batching


def test_a_missing_capability_is_named_with_its_processor():
    made = lp.Chain([ScaleLogitsProcessor(2.0), AddLogitsProcessor()])
    made.require(beams=True, assisted=True)
    made.processors[1].supports_beam = False
    made.require(assisted=True)
    with pytest.raises(ValueError, match="'add' does not support beam search"):
        made.require(beams=True)


# --- specs ---


def test_dicts_yaml_and_json_make_the_same_chain(tmp_path):
    yaml_file, json_file = tmp_path / "chain.yaml", tmp_path / "chain.json"
    yaml_file.write_text("- name: add\n  amount: 2.0\n- {name: scale, factor: 10}\n")
    json_file.write_text(json.dumps({"version": 1, "processors": SPEC}))
    for spec in (SPEC, {"processors": SPEC}, yaml_file, str(yaml_file), json_file):
        assert third(lp.Chain.from_spec(spec)) == 20.0


def test_a_number_with_an_exponent_is_a_number_in_every_form(tmp_path):
    (tmp_path / "chain.yaml").write_text("- {name: scale, factor: 1e-5}\n")
    loaded = lp.Chain.from_spec(tmp_path / "chain.yaml")
    assert loaded.processors[0].factor == 1e-5
    assert parse_processor("scale:factor=1e-5")["factor"] == 1e-5
    for factor in (1e-5, 1e22, float("inf"), 0.1 + 0.2):
        lp.Chain([ScaleLogitsProcessor(factor)]).save_pretrained(tmp_path / "saved", force=True)
        assert lp.Chain.from_pretrained(tmp_path / "saved").processors[0].factor == factor


@pytest.mark.parametrize(
    "spec, message",
    [
        ([{"name": "addd"}], "Unknown method 'addd'. Did you mean 'add'"),
        ([{"name": "add", "amuont": 1}], "Unknown parameter of 'add' 'amuont'. Did you mean 'amount'"),
        ([{"name": "scale"}], "'scale' needs the parameter 'factor'"),
        ([{"amount": 1}], "a mapping with a 'name', got {'amount': 1}"),
        (["add"], "a mapping with a 'name', got 'add'"),
        ({"procesors": []}, "Unknown key of a chain 'procesors'. Did you mean 'processors'"),
        ({}, "A chain is a list of processors"),
        ({"version": 2, "processors": []}, "version 2; this logitproc reads up to 1"),
        ({"version": "two", "processors": []}, "version 'two'; this logitproc reads up to 1"),
        (None, "A chain is a list of processors"),
    ],
)
def test_a_wrong_spec_is_refused_and_named(spec, message):
    with pytest.raises((ValueError, LookupError)) as caught:
        lp.Chain.from_spec(spec)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["chain.json", "chain.yaml"])
@pytest.mark.parametrize("text", ["", "[", "add", "3", "{a: [b}", "\ud800"])
def test_a_file_that_holds_no_chain_is_refused_with_its_path(tmp_path, name, text):
    file = tmp_path / name
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=str(file)):
        lp.Chain.from_spec(file)


def test_a_missing_file_or_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no chain file.*none.yaml"):
        lp.Chain.from_spec(tmp_path / "none.yaml")
    with pytest.raises(FileNotFoundError, match="no folder.*none"):
        lp.Chain.from_pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no chain file.*chain.json"):
        lp.Chain.from_pretrained(tmp_path)


# --- one processor on the command line ---


@pytest.mark.parametrize(
    "text, spec",
    [
        ("add", {"name": "add"}),
        ("add:amount=0.5", {"name": "add", "amount": 0.5}),
        (" add : amount = 2 , tokens = [1, 2] ", {"name": "add", "amount": 2, "tokens": [1, 2]}),
        ("add:tokens=[[1,2],[3]],amount=-1e-3", {"name": "add", "tokens": [[1, 2], [3]], "amount": -1e-3}),
        ("add:a={x: 1, y: [2,3]},b=1", {"name": "add", "a": {"x": 1, "y": [2, 3]}, "b": 1}),
        ("add:label='a,b=c',b=1", {"name": "add", "label": "a,b=c", "b": 1}),
        ('add:labels=["a,]",b],b=1', {"name": "add", "labels": ["a,]", "b"], "b": 1}),
        ("add:label=Don't,b=it's", {"name": "add", "label": "Don't", "b": "it's"}),
        (r"add:prior=C:\runs\x", {"name": "add", "prior": r"C:\runs\x"}),
        ("add:rule=budget(0.05),eos=null,on=true", {"name": "add", "rule": "budget(0.05)", "eos": None,
                                                    "on": True}),
    ],
)  # fmt: skip
def test_a_processor_is_read_from_one_line(text, spec):
    assert parse_processor(text) == spec


@pytest.mark.parametrize("text", ["add:amount", "add:=1", "add:amount=", "add:amount=1,", "add:a=1,b"])
def test_a_part_that_is_not_key_equals_value_is_refused(text):
    with pytest.raises(ValueError, match="is not key=value"):
        parse_processor(text)


def test_a_key_given_twice_and_a_value_that_ends_early_are_refused():
    with pytest.raises(ValueError, match="'amount' is given twice"):
        parse_processor("add:amount=1,amount=2")
    with pytest.raises(ValueError, match="'name' is given twice"):
        parse_processor("add:name=scale")
    with pytest.raises(ValueError, match=r"'tokens=\[1' has no value"):
        parse_processor("add:tokens=[1")


# --- saved ---


class Shared(Artifact):
    kind = "shared"
    tokenizer: ClassVar = {"fingerprint": "", "name": "toy", "vocab_size": WIDTH, "special": []}

    def _state(self):
        return {}, {"numbers": torch.arange(5).numpy()}

    @classmethod
    def _restore(cls, tokenizer, scalars, arrays):
        return cls()


@dataclass(eq=False)
class UsesLogitsProcessor(lp.Processor):
    """Holds an artifact."""

    fitted: Shared
    artifacts: ClassVar = {"fitted": Shared}


def test_saving_keeps_order_and_parameters_and_refuses_to_overwrite(tmp_path):
    made = lp.Chain.from_spec(SPEC)
    made.save_pretrained(tmp_path / "saved")
    loaded = lp.Chain.from_pretrained(tmp_path / "saved")
    assert [p.parameters() for p in loaded.processors] == [p.parameters() for p in made.processors]
    with pytest.raises(FileExistsError, match="--force"):
        made.save_pretrained(tmp_path / "saved")
    lp.Chain().save_pretrained(tmp_path / "saved", force=True)
    assert lp.Chain.from_pretrained(tmp_path / "saved").processors == ()


def test_a_shared_artifact_is_saved_once_and_a_moved_folder_still_loads(tmp_path):
    lp.register("uses", paper="https://example.org")(UsesLogitsProcessor)
    shared = Shared()
    made = lp.Chain([UsesLogitsProcessor(f) for f in (shared, shared, Shared())])
    made.save_pretrained(tmp_path / "saved")
    assert len(list((tmp_path / "saved").rglob("*.safetensors"))) == 2
    (tmp_path / "saved").rename(tmp_path / "moved")
    assert len(lp.Chain.from_pretrained(tmp_path / "moved").processors) == 3


def test_a_folder_in_a_chain_file_is_relative_to_the_file(tmp_path):
    lp.register("uses", paper="https://example.org")(UsesLogitsProcessor)
    Shared().save(tmp_path / "fitted")
    (tmp_path / "chain.yaml").write_text("- {name: uses, fitted: fitted}")
    assert isinstance(lp.Chain.from_spec(tmp_path / "chain.yaml").processors[0].fitted, Shared)


def test_a_processor_without_a_registered_name_cannot_be_saved(tmp_path):
    class Nameless(ScaleLogitsProcessor):
        pass

    with pytest.raises(ValueError, match="Nameless is not registered"):
        lp.Chain([Nameless(2.0)]).save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
