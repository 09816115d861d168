"""What is measured: operations, shapes, layouts and dtypes. Knows nothing of torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Tensors of the size of x that an operation cannot avoid to read or write.
STREAMS = {
    "bn_forward": 2,  # x, y; with the statistics of the batch
    "bn_backward": 3,  # x, dy, dx
    "bn_eval": 2,  # with running statistics
    "bn_add_relu_forward": 3,  # x, residual, y
    "bn_add_relu_backward": 4,  # x, dy, dx, that of the residual
    "gn_forward": 2,
    "gn_backward": 3,
    "gn_silu_forward": 2,
    "gn_silu_backward": 3,
}
OPERATIONS = tuple(STREAMS)
LAYOUTS = ("contiguous", "channels_last")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = tuple(BYTES)
DEFAULT_DTYPES = ("float32", "bfloat16")
CACHE_STATES = ("warm", "cold")  # minimal traffic fits the last-level cache, or does not
NORMS = ("batch_norm", "group_norm")
SECOND_NORMS = ("batch_norm", "group_norm", "group_norm_silu", "group_norm_gelu")
MODES = ("inference", "training")
MIN_VALUES = 10**5  # the first step of `scaling`
VALUES_STEP = 10  # from one step to the next
PEERS = ("torch", "compile", "onednn")


def device_streams(operation: str) -> int:
    """The same of an operation of gpu.py, by its name."""
    if operation.endswith("double backward"):
        return 5
    added = 1 if " add " in operation else 0  # the residual, or its gradient
    return (3 if operation.endswith("backward") else 2) + added


def has_residual(operation: str) -> bool:
    return "_add_" in operation


def is_backward(operation: str) -> bool:
    return operation.endswith("backward")


@dataclass(frozen=True)
class Shape:
    """An input with its channels on axis 1, and the number of its groups in group norm."""

    name: str
    size: tuple[int, ...]
    groups: int

    @property
    def layouts(self) -> tuple[str, ...]:
        """A matrix has one layout only."""
        return LAYOUTS if len(self.size) > 2 else LAYOUTS[:1]


def text_of(size: Iterable[int]) -> str:
    return "x".join(map(str, size))


TINY = Shape("tiny", (2, 8, 4, 4), 4)  # shows the time of a call
SHAPES = (
    Shape("resnet_56", (8, 64, 56, 56), 32),
    Shape("resnet_28", (8, 128, 28, 28), 32),
    Shape("resnet_7", (8, 512, 7, 7), 32),
    Shape("stem", (8, 64, 112, 112), 32),
    Shape("image", (8, 3, 224, 224), 3),
    Shape("sd_unet", (2, 320, 64, 64), 32),
    Shape("vae", (1, 128, 256, 256), 32),
    Shape("unet_3d", (1, 32, 32, 64, 64), 8),
    Shape("mlp", (4096, 256), 32),
    Shape("one_sample", (1, 256, 56, 56), 32),
    TINY,
)


# Of `second`: all of them, and slices of few values.
SECOND_SHAPES = (
    *SHAPES,
    Shape("few_channels", (4096, 64), 8),
    Shape("planes_2", (1024, 64, 2, 2), 16),
    Shape("planes_4", (16, 512, 4, 4), 512),
)


def shape_of(text: str) -> Shape:
    """A shape by its name, or one of the given size, such as 2x64x14x14.

    Raises:
        ValueError: it is neither.
    """
    for shape in SECOND_SHAPES:
        if text in (shape.name, text_of(shape.size)):
            return shape
    fields = text.split("x")
    if not 2 <= len(fields) <= 5 or not all(f.isdecimal() and int(f) > 0 for f in fields):
        names = ", ".join(shape.name for shape in SECOND_SHAPES)
        raise ValueError(f"{text!r} is neither a size such as 2x64x14x14 nor one of {names}")
    size = tuple(map(int, fields))
    return Shape(text, size, math.gcd(size[1], 32))


@dataclass(frozen=True)
class Case:
    operation: str
    shape: Shape
    layout: str
    dtype: str

    @property
    def values(self) -> int:
        return math.prod(self.shape.size)

    @property
    def bytes(self) -> int:
        """Of the traffic that the operation cannot avoid."""
        return STREAMS[self.operation] * BYTES[self.dtype] * self.values

    def __str__(self) -> str:
        return f"{self.operation} {self.shape.name} {self.layout} {self.dtype}"


def cases(
    operations: Iterable[str],
    shapes: Iterable[Shape],
    layouts: Iterable[str],
    dtypes: Iterable[str],
) -> Iterator[Case]:
    for dtype in dtypes:
        for operation in operations:
            for shape in shapes:
                for layout in layouts:
                    if layout in shape.layouts:
                        yield Case(operation, shape, layout, dtype)
