"""Make a data set more diverse: generate in rounds, suppress what came too often. python examples/diversify.py"""

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import logitproc as lp

ROUNDS, PROMPT, FOLDER = 4, "The captain looked at", "my-ledger"

model = AutoModelForCausalLM.from_pretrained(lp.pocket("base"))
tokenizer = AutoTokenizer.from_pretrained(lp.pocket("base"))
inputs = tokenizer([PROMPT] * 20, return_tensors="pt")
sampling = {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": 24}

reference = lp.NGramPrior.load("quixote")  # shares of real text; yours: logitproc fit ngram --order 1
for rule, options in {"plain": None, "paper": {}, "ratio": {"reference": reference}}.items():
    set_seed(0)
    ledger = lp.TokenLedger(tokenizer)  # grows between generations; a processor sees it as it was when made
    for number in range(ROUNDS):
        suppress = [] if options is None else [lp.SuppressionLogitsProcessor(ledger, rule=rule, **options)]
        output = lp.generate(model, lp.Chain(suppress), tokenizer=tokenizer, **inputs, **sampling)
        ledger.update(output[:, inputs["input_ids"].shape[1] :], round=number)
    counts = ledger.counts()
    print(f"{rule}: {(counts > 0).sum()} different tokens of {counts.sum()}, for example:")
    for text in tokenizer.batch_decode(output[:3], skip_special_tokens=True):
        print("  ", *text.split())

ledger.save(FOLDER)
print(f'Go on: logitproc generate --prompt "{PROMPT}" --do-sample --proc suppression:reference=quixote,ledger={FOLDER}')
