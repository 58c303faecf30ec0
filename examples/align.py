"""Turn a preference up, token by token, without training anything: python examples/align.py

`mini-dpo` was tuned to prefer short words, `mini-reverse-dpo` to avoid them; r is the dial.
"""

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import logitproc as lp
from logitproc.bundled import plainness

model = AutoModelForCausalLM.from_pretrained(lp.pocket("mini-dpo"))
tokenizer = AutoTokenizer.from_pretrained(lp.pocket("mini-dpo"))
reverse = lp.Companion.load("mini-reverse-dpo")

prompts = ["The road was long, and", "It is well known that", "She looked at the door and"] * 8
inputs = tokenizer(prompts, return_tensors="pt", padding=True)
for r in (0.0, 1.0, 4.0):
    chain = lp.Chain([lp.AlignDistilLogitsProcessor(reverse, r=r)])
    set_seed(0)
    output = lp.generate(model, chain, tokenizer=tokenizer, **inputs, do_sample=True, max_new_tokens=30)
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    print(f"r = {r}: plainness {sum(map(plainness, texts)) / len(texts):+.2f}")
    for text in texts[:3]:
        print(f"  {' '.join(text.split())}")
