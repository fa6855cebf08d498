"""FSDP2, which shards the backbone too:  torchrun --nproc-per-node 2 examples/fsdp2.py OUT"""

import torch
import torch.distributed as dist
from common import BATCH, LR, digits, output, prompted
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
model = prompted()
mesh = init_device_mesh("cpu", (world,))
for block in model.backbone.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.trainable_parameters(), lr=LR)
for images, labels in zip(*(t.split(BATCH) for t in digits()), strict=True):
    mine = slice(rank, None, world)
    loss = F.cross_entropy(model(images[mine]), labels[mine])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
if rank == 0:
    saved = prompted()
    saved.load_adapter_state_dict(whole)
    saved.save_pretrained(output())
dist.destroy_process_group()
