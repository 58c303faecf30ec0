"""How the studies fine-tune: AdamW, a rate that rises over 5 % of the steps and falls to 0, in bfloat16."""

import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer


def fine_tune(model: Any, rows: list[dict[str, Any]], collator: Any = None, **settings: Any) -> "Trainer":
    """Train a model in place on rows of token ids; `settings` are those of `TrainingArguments`.

    The same seed gives the same model. Gradients are on inside, whatever they are outside.
    """
    import torch
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as nothing, torch.enable_grad():
        arguments = TrainingArguments(
            output_dir=nothing, warmup_steps=0.05, lr_scheduler_type="linear", bf16=True, save_strategy="no",
            use_cpu=not torch.cuda.is_available(), report_to="none", **settings,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
        trainer.train()
    return trainer
