"""One call of a norm on all ranks of a group, and its comparison with the float64 reference.

A ``Call`` describes tensors of the whole batch, which every rank makes alike, and how they are cut
along one axis into the parts of the ranks. ``check(call)`` runs on every rank: it calls the norm
with its own part, and compares output and gradients with that part of the reference's, statistics
with those of the whole batch, and gradients of parameters with the sums over its own part.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import reference
import torch
import torch.distributed as dist
from compare import DIFFERENTIABLE, away_from_zero, call
from rank_groups import assert_equal_bits, assert_the_same_everywhere, group_of, members
from tolerance import assert_close, compute_dtype
from torch import Tensor

import normcore.functional as NF

MASKS = ["samples", "elements", "one rank", "one channel", "one channel of a rank"]


@dataclass(frozen=True)
class Call:
    """A call of all ranks of every group.

    Args:
        shape: of the whole batch of a group, but for axis `split`.
        sizes: of the ranks of a group on axis `split`.
        split: the axis on which the ranks have different parts.
        layout: of the ranks in groups (rank_groups.py).
        form: in which the group is given.
        num_groups: of group norm; None: batch norm.
        dtype: of the input and of the residual.
        param_dtype: of weight and bias; None: `dtype`, but float32 with halves.
        state_dtype: of running statistics; None: float32, but float64 with a float64 input.
        memory: how the input lies in memory (`lay_out`).
        names: the optional operands that are given.
        per_sample: weight and bias of group norm are those of each sample.
        mask: one of MASKS.
        values: "normal"; "far": the mean is 10^6 standard deviations; "apart": the means of the
            ranks are 1000 standard deviations apart; "scaled", "wide": the numbers of a rank are
            10^3 or 10^10 times as large as those of the one before.
        options: other arguments.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    split: int = 0
    layout: str = "world"
    form: str = "object"
    num_groups: int | None = None
    dtype: torch.dtype = torch.float64
    param_dtype: torch.dtype | None = None
    state_dtype: torch.dtype | None = None
    memory: str = "contiguous"
    names: tuple[str, ...] = ("weight", "bias")
    per_sample: bool = False
    mask: str | None = None
    values: str = "normal"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> tuple[int, ...]:
        shape = list(self.shape)
        shape[self.split] = sum(self.sizes)
        return tuple(shape)

    @property
    def is_batch_norm(self) -> bool:
        return self.num_groups is None

    @property
    def axis(self) -> list[int]:
        return reference.axes_of(self.options.get("axis", 1), len(self.shape))

    @property
    def weighting(self) -> str:
        return str(self.options.get("sync_weighting", "count"))

    def part(self, t: Tensor, rank: int) -> Tensor:
        """What the `rank`-th rank of the group holds of a tensor that broadcasts to the input."""
        if t.dim() < len(self.shape) or t.shape[self.split] != sum(self.sizes):
            return t
        return t.narrow(self.split, sum(self.sizes[:rank]), self.sizes[rank])

    def only(self, t: Tensor, rank: int) -> Tensor:
        """`t` with zeros in what other ranks hold."""
        result = torch.zeros_like(t)
        self.part(result, rank).copy_(self.part(t, rank))
        return result


def lay_out(t: Tensor, memory: str) -> Tensor:
    """The same values elsewhere: channels_last, transposed, sliced, or another way on each rank."""
    if memory == "different":
        memory = ["channels_last", "contiguous", "sliced", "transposed"][dist.get_rank() % 4]
    if memory == "channels_last":
        return t.to(memory_format=torch.channels_last)
    if memory == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if memory == "sliced":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]
    return t.contiguous()


def make_input(call: Call) -> Tensor:
    x = 3 * torch.randn(call.whole, dtype=torch.float64) + 2
    if call.values == "far":
        x += 3e6
    for rank in range(len(call.sizes)):
        mine = call.part(x, rank)
        if call.values == "apart":
            mine += 3000 * rank
        elif call.values in ("scaled", "wide"):
            mine *= {"scaled": 1e3, "wide": 1e10}[call.values] ** rank
    return x.to(call.dtype)


def make_mask(call: Call) -> Tensor | None:
    """Nonzero where a value counts."""
    if call.mask is None:
        return None
    if call.mask == "samples":
        shape = [1 if a in call.axis else size for a, size in enumerate(call.whole)]
        return torch.rand(shape) < 0.7
    mask = torch.rand(call.whole) < 0.7
    if call.mask == "one rank":
        call.part(mask, 0).zero_()
    elif call.mask == "one channel":
        mask.select(call.axis[0], 1).zero_()
    elif call.mask == "one channel of a rank":
        call.part(mask, 0).select(call.axis[0], 1).zero_()
    return mask


def make_operands(call: Call) -> dict[str, Tensor]:
    """Of the whole batch; all tensors that are given besides the input."""
    halves = (torch.bfloat16, torch.float16)
    param_dtype = call.param_dtype or (torch.float32 if call.dtype in halves else call.dtype)
    features = [call.whole[a] for a in call.axis]
    of_parameters = [call.whole[0], *features] if call.per_sample else features
    possible = {
        "weight": (torch.rand(of_parameters, dtype=torch.float64) + 0.5).to(param_dtype),
        "bias": torch.randn(of_parameters, dtype=torch.float64).to(param_dtype),
        "residual": torch.randn(call.whole, dtype=torch.float64).to(call.dtype),
    }
    operands = {name: t for name, t in possible.items() if name in call.names}
    mask = make_mask(call)
    if mask is not None:
        operands["mask"] = mask
    if call.is_batch_norm:
        wide = torch.float64 if call.dtype == torch.float64 else torch.float32
        state = call.state_dtype or wide
        operands["running_mean"] = torch.randn(features).to(state)
        operands["running_var"] = (torch.rand(features) + 0.5).to(state)
        operands["num_batches_tracked"] = torch.tensor(3)
    return operands


def by_rank(call: Call, mask: Tensor | None) -> list[Tensor]:
    """The mask of the values that each rank holds."""
    everything = torch.ones(call.whole, dtype=torch.bool)
    valid = everything if mask is None else mask & everything
    return [call.only(valid, rank) for rank in range(len(call.sizes))]


def expect(call: Call, x: Tensor, operands: dict[str, Tensor], dy: Tensor) -> reference.Expected:
    """What single-process normalization of the whole batch gives in float64."""
    arguments: dict[str, Any] = {**operands, **call.options, "dy": dy}
    momentum = arguments.get("momentum", 0.1)
    count = arguments.pop("num_batches_tracked", None)
    if momentum is None:
        arguments["momentum"] = 1 / (count.item() + 1)
    for name in ("dtype", "sync_weighting"):
        arguments.pop(name, None)
    if call.weighting == "rank":
        arguments["mask"] = by_rank(call, operands.get("mask"))
    if call.num_groups is None:
        return reference.batch_norm(x, **arguments)
    return reference.group_norm(x, call.num_groups, **arguments)


def norm(call: Call) -> Any:
    """The function with its group and options."""
    group = group_of(call.layout, call.form)
    if call.num_groups is None:
        options: dict[str, Any] = {"training": True, "group": group, **call.options}
        return lambda x, **tensors: NF.batch_norm(
            x, tensors.pop("running_mean", None), tensors.pop("running_var", None),
            **tensors, **options
        )  # fmt: skip
    options = {"num_groups": call.num_groups, "group": group, **call.options}
    return lambda x, **tensors: NF.group_norm(x, **tensors, **options)


def mine_of(call: Call, operands: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The arguments of a rank, whose state is its own."""
    parts = {name: call.part(t, rank) for name, t in operands.items()}
    return {name: t.clone(memory_format=torch.preserve_format) for name, t in parts.items()}


def check(given: Call) -> None:
    ranks = members(given.layout)
    assert len(ranks) == len(given.sizes)
    rank = ranks.index(dist.get_rank())
    torch.manual_seed(ranks[0])  # groups have different batches
    x, operands = make_input(given), make_operands(given)
    out_dtype = given.options.get("dtype") or given.dtype
    dy = torch.randn(given.whole, dtype=torch.float64).to(out_dtype)
    if given.options.get("activation") == "relu":
        plain = {name: value for name, value in given.options.items() if name != "activation"}
        z = expect(replace(given, options=plain), x, operands, dy)
        operands["residual"] = away_from_zero(z.value["y"], operands["residual"])
    expected = expect(given, x, operands, dy)
    own = expect(given, x, operands, given.only(dy, rank))  # has the gradients of its parameters

    mine = mine_of(given, operands, rank)
    my_x = lay_out(given.part(x, rank), given.memory)
    y, grads = call(norm(given), my_x, given.part(dy, rank), **mine)
    assert y.dtype == out_dtype
    assert [grads[name].dtype for name in mine if name in grads] == [
        mine[name].dtype for name in mine if name in grads
    ]
    assert y.stride() == grads["x"].stride() == torch.empty_like(my_x).stride()

    compute = compute_dtype(x, out_dtype, *(operands.get(name) for name in DIFFERENTIABLE))
    alive = expected.value["y"].isfinite()  # what is NaN has no gradient
    for name, got in {"y": y, **grads}.items():
        if name in ("weight", "bias"):
            want, magnitude = own.value[name], own.magnitude[name]
            usable = want.isfinite()
            lost = got[~usable]  # NaN, but where no gradient comes in
            assert (lost.isnan() | (lost == 0)).all(), name
        else:
            want, magnitude = (
                given.part(t[name], rank) for t in (expected.value, expected.magnitude)
            )
            usable = given.part(alive, rank) | (name == "y")
        assert_close(
            torch.where(usable, got, 0),
            torch.where(usable, want, 0),
            compute=compute,
            length=expected.length,
            magnitude=magnitude.nan_to_num(),
            name=name,
        )
    if given.is_batch_norm:
        check_statistics(given, mine, operands, expected)


def check_statistics(
    call: Call, mine: dict[str, Tensor], before: dict[str, Tensor], expected: reference.Expected
) -> None:
    """Those of the whole batch, with the same bits on all ranks."""
    for name, key in (("running_mean", "mean"), ("running_var", "var")):
        want = expected.value[key]
        largest = want.abs().nan_to_num(0.0).max().item()
        if call.values == "far" and call.dtype == torch.float64:
            largest *= 1e6  # the means of ranks are rounded, as of_mean in reference.py
        assert_close(mine[name], want, length=expected.length, magnitude=largest, name=name)
        assert_the_same_everywhere(mine[name], call.layout, name)
        untouched = want == before[name]
        assert_equal_bits(mine[name][untouched], before[name][untouched], name)
    # A batch counts if it has a value that counts.
    counts = sum(call.sizes) > 0 and ("mask" not in before or bool(before["mask"].any()))
    assert mine["num_batches_tracked"] == before["num_batches_tracked"] + counts


def check_far(given: Call) -> None:
    """The bound of the library for means of up to 10^6 standard deviations."""
    rank = dist.get_rank()
    x, operands = make_input(given), make_operands(given)
    want = given.part(expect(given, x, operands, torch.zeros_like(x)).value["y"], rank)
    got = norm(given)(given.part(x, rank), **mine_of(given, operands, rank))
    # |y| is up to 4 here; 1e-6 is relative to its standard deviation, which is 1 without `weight`.
    assert (got - want).abs().max() < 1e-6 * max(1.0, want.abs().max().item())


def check_order(given: Call) -> None:
    """Running statistics do not depend on which rank holds which part, to the bit."""
    ranks = members(given.layout)
    rank = ranks.index(dist.get_rank())
    x, operands = make_input(given), make_operands(given)
    found = []
    for order in itertools.islice(itertools.permutations(range(len(ranks))), 0, None, 5):
        mine = mine_of(given, operands, order[rank])
        norm(given)(given.part(x, order[rank]), **mine)
        found.append(mine)
        for name in ("running_mean", "running_var"):
            assert_equal_bits(mine[name], found[0][name], f"{name} in order {order}")


def check_hidden(given: Call, value: float) -> None:
    """What a mask hides on the first rank reaches no bit of what any rank has."""
    rank = dist.get_rank()
    x, operands = make_input(given), make_operands(given)
    mask = operands["mask"].expand(given.whole)
    dy = torch.randn_like(x) * mask
    results = []
    for hidden in (0.0, value):
        mine = mine_of(given, operands, rank)
        y, grads = call(
            norm(given), given.part(x.where(mask, hidden), rank), given.part(dy, rank), **mine
        )
        seen = given.part(mask, rank)
        state = {name: t for name, t in mine.items() if name.startswith("running")}
        results.append({"y": y[seen], **grads, "x": grads["x"][seen], **state})
    for name, got in results[1].items():
        assert_equal_bits(got, results[0][name], name)


def check_special_value(given: Call, value: float) -> None:
    """Of the first rank: all values of its channel have it in their statistics, no others."""
    rank = dist.get_rank()
    x, operands = make_input(given), make_operands(given)
    x[0, 1] = value
    mine = mine_of(given, operands, rank)
    y = norm(given)(given.part(x, rank), **mine)
    for t in (y.transpose(0, 1), mine["running_mean"], mine["running_var"]):
        assert not t[1].isfinite().any()
        assert t[[0, 2]].isfinite().all()
    assert y[:, 1].isnan().all()


def check_alone(given: Call) -> None:
    """A group of one rank has the bits of no group at all."""
    x, operands = make_input(given), make_operands(given)
    dy = torch.randn_like(x)
    results = []
    for options in (given.options, given.options | {"group": None}):
        one = replace(given, layout="alone", options=options)
        mine = mine_of(one, operands, 0)
        y, grads = call(norm(one), x, dy, **mine)
        results.append({"y": y, **grads, **mine})
    for name, got in results[0].items():
        assert_equal_bits(got, results[1][name], name)
