"""timm's own optimizer, schedule and averaged weights:  python examples/timm_parts.py OUT"""

from common import BATCH, LR, digits, output, prompted
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.nn import functional as F

model = prompted()
optimizer = create_optimizer_v2(model, opt="momentum", lr=LR, weight_decay=0.0, momentum=0.0)
schedule, _ = create_scheduler_v2(optimizer, sched="step", num_epochs=1, decay_epochs=1)
averaged = ModelEmaV3(model, decay=0.9)
for images, labels in zip(*(t.split(BATCH) for t in digits()), strict=True):
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    averaged.update(model)
schedule.step(1)
model.save_pretrained(output())
averaged.module.save_pretrained(output() + "-averaged")
