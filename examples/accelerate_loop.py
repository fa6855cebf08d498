"""accelerate:  torchrun --nproc-per-node 2 examples/accelerate_loop.py OUT
(or accelerate launch, which asks for the machine first)"""

import torch
from accelerate import Accelerator
from common import BATCH, LR, digits, output, prompted
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True)
model = prompted()
optimizer = torch.optim.SGD(model.trainable_parameters(), lr=LR)
# the processes take turns at the loader's batches: together one of the plain loop's
loader = DataLoader(TensorDataset(*digits()), batch_size=BATCH // accelerator.num_processes)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for images, labels in loader:
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(output())
accelerator.end_training()
