"""Networks of one's own at random: convolutions with all that may stand around them.

Values are read twice, aliased, written over, broadcast, of other shapes and precisions; modules and
weights are used twice. Some cannot be computed at all.
"""

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS = 4


def _python_iadd(network, a, b):
    a += b
    return a


def _python_isub(network, a, b):
    a -= b
    return a


def _python_imul(network, a, b):
    a *= 0.5
    return a


def _data_iadd(network, a, b):
    a.data += b
    return a


def _counted(network, a, b):
    height = rows = a.shape[2]
    rows += 1
    return a * height + rows


def _remembers(network, a, b):
    network.turns += 1
    return a * (network.turns % 2)


def _knows_types(network, a, b):
    return a * 2 if isinstance(a, torch.Tensor) else a


_ALIASES: list[Callable] = [
    lambda n, a, b: a.view_as(a),
    lambda n, a, b: a[:],
    lambda n, a, b: a.detach(),
    lambda n, a, b: a.data,
    lambda n, a, b: a.transpose(0, 1).transpose(0, 1),
    lambda n, a, b: a.unsqueeze(0).squeeze(0),
    lambda n, a, b: a.chunk(1)[0],
    lambda n, a, b: a[:, :CHANNELS],
    lambda n, a, b: a.mT.mT,
    lambda n, a, b: a,
]
_WRITES: list[Callable] = [
    _python_iadd,
    _python_isub,
    _python_imul,
    _data_iadd,
    lambda n, a, b: a.add_(b),
    lambda n, a, b: a.mul_(0.5),
    lambda n, a, b: torch.add(a, b, out=a),
    lambda n, a, b: a.mT.add_(1).mT,
    lambda n, a, b: operator.iadd(a, b),
    lambda n, a, b: a.copy_(b),
    lambda n, a, b: F.relu(a, inplace=True),
    lambda n, a, b: a.relu_(),
]
_SUMS: list[Callable] = [
    lambda n, a, b: a + b,
    lambda n, a, b: torch.add(a, b),
    lambda n, a, b: torch.add(a, b, alpha=2),
    lambda n, a, b: a + b.double(),
    lambda n, a, b: a + 1,
    lambda n, a, b: a + a.shape[3],
    lambda n, a, b: a - b,
    lambda n, a, b: a + b.mean((2, 3), keepdim=True),
    lambda n, a, b: a.mean((2, 3), keepdim=True) + b,
    lambda n, a, b: a + b[:1],
    lambda n, a, b: b[:1] + a,
    lambda n, a, b: a.add(b),
    _counted,
    lambda n, a, b: a + b.contiguous(memory_format=torch.channels_last),
    lambda n, a, b: torch.add(b, a),
    lambda n, a, b: a + b.expand(2, *b.shape).sum(0),
    lambda n, a, b: a + b[..., :1],
]
_RELUS: list[Callable] = [
    lambda n, a, b: F.relu(a),
    lambda n, a, b: F.relu(input=a),
    lambda n, a, b: torch.relu(a),
    lambda n, a, b: a.relu(),
    lambda n, a, b: F.relu(a, inplace=True),
]


class OwnNetwork(nn.Module):
    """A list of steps, each from two of the values so far to the next one; some are results."""

    def __init__(self, rng, tidy: bool):
        super().__init__()
        size = rng.choice([1, 3])
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.convs = nn.ModuleList(
            nn.Conv2d(CHANNELS, CHANNELS, size, padding=size // 2, bias=rng.random() < 0.5)
            for _ in range(6)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(CHANNELS) for _ in range(4))
        self.relus = nn.ModuleList([nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU(inplace=True)])
        self.nothing, self.pool = nn.Identity(), nn.AvgPool2d(3, 1, 1)
        self.turns = 0
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        # Each module once, but for some.
        free = {name: list(range(len(getattr(self, name)))) for name in ("convs", "norms")}
        self.steps: list[tuple[Callable, int, int]] = []
        last = 0

        def add(step: Callable, other: int | None = None) -> None:
            nonlocal last
            number = len(self.steps)
            first = last if rng.random() < 0.8 else rng.randint(0, number)
            second = rng.randint(max(0, number - 4), number) if other is None else other
            self.steps.append((step, first, second))
            last = number + 1

        def one(name: str) -> Callable:
            reused = rng.random() < 0.1 or not free[name]
            index = rng.randrange(len(getattr(self, name))) if reused else free[name].pop()
            if rng.random() < 0.05:
                return lambda n, a, b: getattr(n, name)[index](input=a)
            return lambda n, a, b: getattr(n, name)[index](a)

        relus = [lambda n, a, b, i=i: n.relus[i](a) for i in range(3)]
        others = [
            lambda n, a, b: n.nothing(a),
            lambda n, a, b: n.pool(a),
            lambda n, a, b: a * n.convs[0].weight.mean(),
            lambda n, a, b: a + n.norms[0].weight.sum(),
            lambda n, a, b: F.conv2d(a, n.convs[1].weight[:, :, :1, :1]),
        ]
        if not tidy:
            others += [_remembers, _knows_types]
        for _ in range(rng.randint(2, 5)):
            residual = last
            for _ in range(rng.randint(1, 2)):
                add(one("convs"))
                if rng.random() < 0.6:
                    add(one("norms"))
                if rng.random() < 0.3:
                    add(rng.choice([*_ALIASES, *_WRITES, *others]))
                elif rng.random() < 0.5:
                    add(rng.choice(relus + _RELUS))
            if rng.random() < 0.7:
                add(rng.choice([_SUMS[0], _python_iadd, rng.choice(_SUMS + _WRITES)]), residual)
            if rng.random() < 0.8:
                add(rng.choice(relus + _RELUS))
        count = len(self.steps) + 1
        self.results = sorted({last, *(rng.randrange(count) for _ in range(rng.randint(0, 2)))})

    def forward(self, images):
        values = [self.stem(images)]
        for step, first, second in self.steps:
            values.append(step(self, values[first], values[second]))
        return {str(index): values[index] for index in self.results}
