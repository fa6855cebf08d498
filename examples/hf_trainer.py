"""Hugging Face's Trainer; its checkpoints hold the adapter:  python examples/hf_trainer.py OUT"""

from common import BATCH, LR, digits, output, prompted
from transformers import Trainer, TrainingArguments

model = prompted()
images, labels = digits()
data = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
folder = output()
arguments = TrainingArguments(
    f"{folder}-checkpoints",
    num_train_epochs=1,
    per_device_train_batch_size=BATCH,
    train_sampling_strategy="sequential",  # the plain loop's order
    optim="sgd",
    learning_rate=LR,
    lr_scheduler_type="constant",
    max_grad_norm=0,
    save_steps=2,
    report_to=[],
    use_cpu=True,
)
trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
trainer.train()
print(trainer.evaluate())
model.save_pretrained(folder)
