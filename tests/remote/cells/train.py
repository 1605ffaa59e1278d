import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", rank=rank, world_size=world)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
inputs = torch.randn(32, 8, dtype=torch.float64)
targets = inputs.sum(dim=1, keepdim=True).sin()
part = slice(rank * 32 // world, (rank + 1) * 32 // world)
parallel = DistributedDataParallel(model)
optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
for _ in range(20):
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(parallel(inputs[part]), targets[part]).backward()
    optimizer.step()
loss = torch.nn.functional.mse_loss(model(inputs), targets).item()
dist.destroy_process_group()
