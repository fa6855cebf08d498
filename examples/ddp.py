"""DistributedDataParallel:  torchrun --nproc-per-node 2 examples/ddp.py OUT"""

import torch
import torch.distributed as dist
from common import BATCH, LR, digits, output, prompted
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
model = prompted()
parallel = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.trainable_parameters(), lr=LR)
for images, labels in zip(*(t.split(BATCH) for t in digits()), strict=True):
    mine = slice(rank, None, world)
    loss = F.cross_entropy(parallel(images[mine]), labels[mine])
    optimizer.zero_grad()
    loss.backward()  # the gradients' mean over the processes
    optimizer.step()
if rank == 0:
    model.save_pretrained(output())
dist.destroy_process_group()
