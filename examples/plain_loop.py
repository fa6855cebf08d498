"""The loop that all other examples equal:  python examples/plain_loop.py OUT"""

import torch
from common import BATCH, LR, digits, output, prompted
from torch.nn import functional as F

model = prompted()
optimizer = torch.optim.SGD(model.trainable_parameters(), lr=LR)
for images, labels in zip(*(t.split(BATCH) for t in digits()), strict=True):
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.save_pretrained(output())
