import torch
from torch import nn

import normcore

net = nn.Sequential(
    nn.Linear(10, 32),
    normcore.BatchNorm(num_features=32, activation="relu"),
    nn.Linear(32, 2),
)
torch.jit.script(net.eval()).save("net.pt")
