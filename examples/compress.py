"""Fit a smaller output head, see what it costs, use it and keep it: python examples/compress.py text.txt"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import logitproc as lp

model = AutoModelForCausalLM.from_pretrained(lp.pocket("base"))
tokenizer = AutoTokenizer.from_pretrained(lp.pocket("base"))

reading = lp.Calibration.collect(model, sys.argv[1], tokenizer)  # once, for all heads
for kind in ("paper", "weighted"):
    head = lp.VQHead.fit(model, reading, codes=128, kind=kind)
    held_out = head.about["held_out"]
    print(f"{kind}: perplexity x {held_out['perplexity_ratio']:.2f}, KL {held_out['kl']:.3f} nats")

prompt = tokenizer("The road was long", return_tensors="pt")
with lp.attach(model, head):
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0], skip_special_tokens=True))

lp.convert(model, head).save_pretrained("compressed")
tokenizer.save_pretrained("compressed")
again = lp.load_converted("compressed")
print(tokenizer.decode(again.generate(**prompt, max_new_tokens=20)[0], skip_special_tokens=True))
