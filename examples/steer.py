"""Steer a model towards the style of a text file: python examples/steer.py my-style.txt"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import logitproc as lp

model = AutoModelForCausalLM.from_pretrained(lp.pocket("base"))
tokenizer = AutoTokenizer.from_pretrained(lp.pocket("base"))

prior = lp.NGramPrior.fit(sys.argv[1], tokenizer, order=3)
inputs = tokenizer(["The road was long", "I never", "She said"], return_tensors="pt", padding=True)
for strength in (0.0, 0.3, 0.6):
    chain = lp.Chain([lp.NGramStyleLogitsProcessor(prior, strength=strength)])
    output = lp.generate(model, chain, tokenizer=tokenizer, **inputs, do_sample=True, max_new_tokens=40)
    for text in tokenizer.batch_decode(output, skip_special_tokens=True):
        print(f"{strength}: {text}")
