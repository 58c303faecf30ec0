"""Give `base` what a fine-tuned `mini` learned, without training it: python examples/fuse.py [EXPERT [SMALL BASE]]"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import logitproc as lp

names = dict(zip(("expert", "base"), sys.argv[1:], strict=False))
expert = lp.Companion.load(names.get("expert", "mini-dpo"))
small = lp.Companion.load(names.get("base", "mini"))  # what the expert was before it was fine-tuned

model = AutoModelForCausalLM.from_pretrained(lp.pocket("base"))
tokenizer = AutoTokenizer.from_pretrained(lp.pocket("base"))
inputs = tokenizer(["The road was long", "I never", "She said"], return_tensors="pt", padding=True)

for mode in (None, "static", "newton", "mixture"):
    set_seed(0)
    processors = [lp.DynamicFusionLogitsProcessor(expert, small, mode=mode)] if mode else []
    output = lp.generate(model, lp.Chain(processors), tokenizer=tokenizer, **inputs, do_sample=True, max_new_tokens=16)
    for text in tokenizer.batch_decode(output, skip_special_tokens=True):
        print(f"{mode or 'base alone'}:", *text.split())
