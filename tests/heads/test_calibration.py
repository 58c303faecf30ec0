import pytest
import torch
from conftest import tiny_model, tiny_tokenizer

import logitproc as lp
from logitproc.heads import Calibration

WORDS = [" ".join(f"w{3 + (7 * i + j) % 90}" for j in range(30)) for i in range(12)]


def collect(model, texts=WORDS, **settings):
    return Calibration.collect(model, texts, tiny_tokenizer(), context=20, **settings)


def test_states_are_what_the_head_receives_and_labels_what_follows():
    model = tiny_model()
    found = collect(model, tokens=100)
    ids = [token for text in WORDS for token in tiny_tokenizer()(text)["input_ids"]]
    assert found.states.shape == (100, 16) and found.labels.tolist() == ids[1:101]
    first = model.model(torch.tensor([ids[:20]])).last_hidden_state[0]
    torch.testing.assert_close(found.states[:20], first)
    assert found.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert found.text != collect(model, WORDS[1:], tokens=100).text


def test_no_more_is_read_than_was_asked_for_and_progress_is_reported():
    seen = []
    assert len(collect(tiny_model(), tokens=50, batch_size=2, report=seen.append).states) == 60
    assert [(event.step, event.steps) for event in seen] == [(2, 3), (3, 3)]


def test_the_first_part_and_the_last_one_are_disjoint():
    train, held = collect(tiny_model(), tokens=100).parts
    assert (len(train.states), len(held.states)) == (90, 10)


def test_bad_input_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="too short: it has fewer than 21 tokens"):
        collect(tiny_model(), ["w3 w4"])
    broken = tiny_model()
    broken.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite weights"):
        lp.VQHead.fit(broken, WORDS, codes=8, tokenizer=tiny_tokenizer())
    odd = tiny_model()
    odd.config.final_logit_softcapping = 30.0  # which Llama ignores
    with pytest.raises(ValueError, match="changes its logits after the head, not by soft-capping alone"):
        collect(odd)
    headed = tiny_model()
    headed.lm_head = torch.nn.Sequential(headed.lm_head)
    with pytest.raises(ValueError, match="this model has Sequential"):
        collect(headed)
