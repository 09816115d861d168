"""The groups of devices that norms take statistics over, by the names of :mod:`torch.distributed`.

``axis_name`` of :class:`normcore.BatchNorm` and :class:`normcore.GroupNorm` is a dimension of the
``DeviceMesh`` that :func:`use_mesh` or :func:`set_mesh` makes the active one::

    mesh = torch.distributed.init_device_mesh("cuda", (4, 2), mesh_dim_names=("data", "model"))
    norm = normcore.BatchNorm(axis_name="data")
    with normcore.distributed.use_mesh(mesh):
        y = norm(x)

"world", the default process group, needs no mesh. Without a process group every name means this
process alone, so that the same program runs on one device.

With ``axis_index_groups`` the first call makes process groups, which all ranks of the axis have to
do together; later calls, and all norms with an equal partition, find them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["set_mesh", "use_mesh"]

_FunctionT = TypeVar("_FunctionT", bound=Callable[..., Any])

_mesh: DeviceMesh | None = None

# By the default process group, which a program may destroy and initialise again: then the same
# names stand for other groups.
_subgroups: WeakKeyDictionary[Any, dict[Any, str]] = WeakKeyDictionary()


def _constant(function: _FunctionT) -> _FunctionT:
    """Makes torch.compile take the result for a constant, as long as the arguments are the same.

    As ``torch.compiler.assume_constant_result`` does, which imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def set_mesh(mesh: DeviceMesh | None) -> None:
    """Makes `mesh` the one whose dimensions ``axis_name`` refers to, in the whole process.

    Args:
        mesh: a mesh with ``mesh_dim_names``, or a slice of one; None for no mesh.

    Raises:
        TypeError: `mesh` is no DeviceMesh.
        ValueError: its dimensions have no names.
    """
    global _mesh
    _check_mesh("set_mesh", mesh)
    _mesh = mesh


@contextmanager
def use_mesh(mesh: DeviceMesh | None) -> Iterator[None]:
    """:func:`set_mesh` within a context, after which the former mesh is the active one again.

    An activation checkpoint calls norms again in the backward pass, which then belongs into the
    context too.
    """
    global _mesh
    _check_mesh("use_mesh", mesh)
    former = _mesh
    _mesh = mesh
    try:
        yield
    finally:
        _mesh = former


def axis_group(
    op: str, axis_name: str, axis_index_groups: Sequence[Sequence[int]] | None
) -> str | None:
    """Name of the process group that `axis_name` stands for; None for this process alone.

    Raises:
        ValueError: there is no such axis, or `axis_index_groups` is no partition of it.
    """
    if not dist.is_available():
        return None
    # What decides is an argument: compiled code is guarded by it.
    return _axis_group(op, axis_name, axis_index_groups, _mesh, dist.group.WORLD)


def group_name(op: str, argument: str, group: object) -> str | None:
    """Name of the process group that `group` stands for; None for this process alone.

    It is a process group, its name, "world" for the default one, or a mesh of one dimension.

    Raises:
        TypeError: `group` is something else.
        ValueError: this rank is not in the group, or the mesh has several dimensions.
    """
    if group is None or not dist.is_available():
        return None
    return _group_name(op, argument, group, dist.group.WORLD)


def group_of_several(op: str, argument: str, group: object) -> str | None:
    """:func:`group_name`, and None where the group is this process alone."""
    if group is None or not dist.is_available():
        return None
    return _group_of_several(op, argument, group, dist.group.WORLD)


def without_handle(group: Any) -> Any:
    """The name of a process group, which can be copied and pickled; names and None stay."""
    if group is None or isinstance(group, str):
        return group
    return (group.get_group() if _is_mesh(group) else group).group_name


def resolve(group: Any) -> Any:
    """The process group of a name; a process group and None stay, and names of none."""
    if not isinstance(group, str) or not dist.is_available():
        return group
    from torch._C._distributed_c10d import _resolve_process_group

    try:
        return _resolve_process_group(group)  # type: ignore[arg-type]
    except RuntimeError:
        return group


@_constant
def _check_mesh(op: str, mesh: Any) -> None:
    mesh = _real(mesh)
    if mesh is None:
        return
    if not _is_mesh(mesh):
        raise TypeError(f"{op}: expected mesh to be a DeviceMesh or None, got {mesh!r}")
    if mesh.mesh_dim_names is None:
        raise ValueError(f"{op}: expected mesh to have mesh_dim_names, got None")


def _is_mesh(value: object) -> bool:
    # Its module takes long to import, and is imported where there is one.
    return hasattr(value, "mesh_dim_names")


def _real(value: Any) -> Any:
    """`value`, which torch.compile hands over in a wrapping of its own."""
    return getattr(value, "real_obj", value)


@_constant
def _axis_group(
    op: str,
    axis_name: str,
    axis_index_groups: Sequence[Sequence[int]] | None,
    mesh: Any,
    world: Any,
) -> str | None:
    mesh, world = _real(mesh), _real(world)
    if world is None:
        return None
    parent = world if axis_name == "world" else _dimension(op, axis_name, mesh)
    if axis_index_groups is None:
        return parent.group_name
    return _subgroup(op, parent, tuple(map(tuple, axis_index_groups)), world)


def _dimension(op: str, axis_name: str, mesh: Any) -> ProcessGroup:
    """The process group of the dimension `axis_name` of `mesh`, if there is one."""
    if mesh is None:
        raise ValueError(
            f"{op}: expected axis_name to be 'world' or a dimension of the active mesh, got "
            f"{axis_name!r} and no mesh; normcore.distributed.use_mesh activates one"
        )
    _require_member(op, "the active mesh", mesh)
    try:
        group: ProcessGroup = mesh.get_group(axis_name)  # knows flattened dimensions as well
    except KeyError:
        raise ValueError(
            f"{op}: expected axis_name to be 'world' or a dimension of the active mesh, "
            f"{mesh.mesh_dim_names}, got {axis_name!r}"
        ) from None
    return group


def _require_member(op: str, argument: str, mesh: Any) -> None:
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"{op}: expected {argument} to hold this rank, {dist.get_rank()}, got {mesh}: this "
            "rank is not in the group"
        )


def _subgroup(
    op: str, parent: ProcessGroup, partition: tuple[tuple[int, ...], ...], world: ProcessGroup
) -> str | None:
    """Name of the part of `parent` that this rank is in; None if it is alone there everywhere."""
    size = parent.size()
    parts = sorted(sorted(part) for part in partition)
    if sorted(index for part in parts for index in part) != list(range(size)):
        raise ValueError(
            f"{op}: expected axis_index_groups to be a partition of range({size}), the ranks of "
            f"axis_name, got {[list(part) for part in partition]}"
        )
    if len(parts) == 1:
        return parent.group_name
    if len(parts) == size:
        return None
    known = _subgroups.setdefault(world, {})
    key = (parent.group_name, tuple(map(tuple, parts)))
    if key not in known:
        ranks = dist.get_process_group_ranks(parent)
        # new_group() is a call of all ranks of the world: it names groups by counting them, and
        # NCCL may split the communicator of all. So all ranks make all parts of the world. Ranks
        # outside of a smaller parent may not come here at all; those inside make the one part
        # that they are in, which keeps their counts equal: it is one group for each of them.
        # Until torch 2.11 such a name also depends on how many groups the rank was in before,
        # which therefore has to be equal for all ranks of the parent.
        is_local = parent.group_name != world.group_name
        for part in parts:
            group: Any = dist.new_group(
                [ranks[index] for index in part], use_local_synchronization=is_local
            )
            if parent.rank() in part:
                known[key] = group.group_name
    return known[key]


@_constant
def _group_name(op: str, argument: str, group: Any, world: Any) -> str | None:
    group, world = _real(group), _real(world)
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"{op}: expected {argument} to be a process group of this rank, got "
            "GroupMember.NON_GROUP_MEMBER: this rank is not in the group"
        )
    if _is_mesh(group) and group.ndim != 1:
        raise ValueError(
            f"{op}: expected {argument} to be a DeviceMesh of one dimension, got {group.ndim}: "
            f"{group.mesh_dim_names}"
        )
    if not (isinstance(group, str) or _is_mesh(group) or hasattr(group, "group_name")):
        raise TypeError(
            f"{op}: expected {argument} to be a process group or its name, got {group!r}"
        )
    if world is None:
        return None
    if isinstance(group, str):
        name: str = world.group_name if group == "world" else group
    elif _is_mesh(group):
        _require_member(op, argument, group)
        name = group.get_group().group_name
    else:
        name = group.group_name
    return name


@_constant
def _group_of_several(op: str, argument: str, group: Any, world: Any) -> str | None:
    name = _group_name(op, argument, group, world)
    found = resolve(name)
    # Of a name that there is none of, the operator says so.
    return name if isinstance(found, str) or (found is not None and found.size() > 1) else None
