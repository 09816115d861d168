"""Groups of ranks by name, SyncBatchNorm and its conversion, in one process.

What several ranks compute is tested in tests/distributed.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nn_cases import assert_same, pair, step
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import normcore
import normcore.nn as NN
from normcore import functional as NF
from normcore.distributed import set_mesh, use_mesh

ProcessGroup = Any


@pytest.fixture
def world() -> Iterator[ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def mesh(world: ProcessGroup) -> DeviceMesh:
    return init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "model"))


# ---- axis_name ----


KINDS: dict[Any, dict[str, Any]] = {
    normcore.BatchNorm: {},
    normcore.GroupNorm: {"num_groups": 2},
}
each_norm = pytest.mark.parametrize(
    ("kind", "own"), KINDS.items(), ids=[kind.__name__ for kind in KINDS]
)


@each_norm
@pytest.mark.parametrize("name", ["world", "data", "no such name"])
def test_axis_name_without_a_process_group(kind: Any, own: dict[str, Any], name: str) -> None:
    x = torch.randn(8, 6)
    options = {"axis_name": name, "axis_index_groups": [[0]], "sync_weighting": "rank"}
    assert torch.equal(kind(**own, **options)(x), kind(**own)(x))


@each_norm
@pytest.mark.parametrize("name", ["world", "data"])
@pytest.mark.parametrize("groups", [None, [[0]]], ids=str)
@pytest.mark.parametrize("weighting", ["count", "rank"])
def test_axis_name_on_one_rank(
    kind: Any, own: dict[str, Any], name: str, groups: Any, weighting: str, mesh: DeviceMesh
) -> None:
    x = torch.randn(8, 6)
    norm = kind(**own, axis_name=name, axis_index_groups=groups, sync_weighting=weighting)
    with use_mesh(mesh):
        assert torch.equal(norm(x), kind(**own)(x))  # lazy until now
        assert torch.equal(norm(x), kind(**own)(x))


@each_norm
def test_errors_of_axis_name(kind: Any, own: dict[str, Any], mesh: DeviceMesh) -> None:
    x = torch.randn(8, 6)
    norm = kind(**own, axis_name="pipeline", num_features=6)
    op = kind.__name__
    with pytest.raises(
        ValueError, match=f"^{op}: expected axis_name .* got 'pipeline' and no mesh; .*use_mesh"
    ):
        norm(x)
    text = f"^{op}: expected axis_name .*, \\('data', 'model'\\), got 'pipeline'$"
    with use_mesh(mesh), pytest.raises(ValueError, match=text):
        norm(x)
    norm = kind(**own, axis_name="world", axis_index_groups=[[1], [0, 2]])
    text = f"^{op}: .*axis_index_groups to be a partition of range\\(1\\), .* got {[[1], [0, 2]]}"
    with pytest.raises(ValueError, match=text.replace("[", r"\[")):
        norm(x)
    assert not norm.initialized


def test_running_statistics_need_no_mesh(world: ProcessGroup) -> None:
    norm = normcore.BatchNorm(num_features=6, axis_name="data")
    x = torch.randn(8, 6)
    assert norm.eval()(x).shape == x.shape
    assert norm.train()(x, use_running_average=True).shape == x.shape
    assert normcore.BatchNorm(axis_name="data").init(x).initialized


def test_mesh_contexts_nest(mesh: DeviceMesh) -> None:
    norm = normcore.BatchNorm(num_features=6, axis_name="inner")
    inner = init_device_mesh("cpu", (1,), mesh_dim_names=("inner",))
    x = torch.randn(8, 6)

    def is_active() -> bool:
        try:
            norm(x)
        except ValueError:
            return False
        return True

    with use_mesh(mesh):
        assert not is_active()
        with use_mesh(inner):
            assert is_active()
            with use_mesh(None):
                assert not is_active()
            assert is_active()
        assert not is_active()
        with pytest.raises(ZeroDivisionError), use_mesh(inner):
            raise ZeroDivisionError
        assert not is_active()
    set_mesh(inner)
    assert is_active()
    set_mesh(None)
    assert not is_active()


def test_dimensions_that_are_sliced_or_flattened(mesh: DeviceMesh) -> None:
    mesh["data", "model"]._flatten("both")
    x = torch.randn(8, 6)
    for active, name in ((mesh["data"], "data"), (mesh, "both")):
        with use_mesh(active):
            assert normcore.BatchNorm(axis_name=name)(x).shape == x.shape


@pytest.mark.parametrize("install", [set_mesh, lambda mesh: use_mesh(mesh).__enter__()])
def test_errors_of_meshes(install: Any, world: ProcessGroup) -> None:
    with pytest.raises(TypeError, match="_mesh: expected mesh to be a DeviceMesh or None, got 3"):
        install(3)
    with pytest.raises(ValueError, match="_mesh: expected mesh to have mesh_dim_names, got None"):
        install(init_device_mesh("cpu", (1,)))


def test_names_do_not_survive_the_process_group(mesh: DeviceMesh) -> None:
    norm = normcore.BatchNorm(num_features=6, axis_name="data", axis_index_groups=[[0]])
    x = torch.randn(8, 6)
    with use_mesh(mesh):
        norm(x)
    dist.destroy_process_group()
    norm(x)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for _ in range(3):  # names are numbers, which are given again
        dist.new_group([0])
    new = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "model"))
    with use_mesh(new):
        name = normcore.distributed.axis_group("BatchNorm", "data", None)
    assert name == new.get_group("data").group_name


def test_modules_with_axis_name_are_copied(mesh: DeviceMesh) -> None:
    norm = normcore.BatchNorm(axis_name="data", axis_index_groups=[[0]])
    x = torch.randn(8, 6)
    with use_mesh(mesh):
        want = norm(x)
        for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
            assert torch.equal(other(x), want)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@each_norm
def test_axis_name_in_a_compiled_graph(
    kind: Any, own: dict[str, Any], backend: str, mesh: DeviceMesh
) -> None:
    x = torch.randn(8, 6)
    norm = kind(**own, num_features=6, axis_name="data", axis_index_groups=[[0]])
    want = kind(**own)(x)
    step = torch.compile(norm, fullgraph=True, backend=backend)
    with use_mesh(mesh):
        torch.testing.assert_close(step(x), want)

    def in_context(x: Tensor) -> Tensor:
        with use_mesh(mesh):
            return norm(x)

    step = torch.compile(in_context, fullgraph=True, backend=backend)
    torch.testing.assert_close(step(x), want)


def test_equal_meshes_of_other_groups(mesh: DeviceMesh) -> None:
    for _ in range(2):
        other = DeviceMesh.from_group(dist.new_group([0]), "cpu", mesh_dim_names=("data",))
        with normcore.distributed.use_mesh(other):
            name = normcore.distributed.axis_group("op", "data", None)
        assert name == other.get_group("data").group_name != mesh.get_group("data").group_name


def test_compiled_code_is_guarded_by_mesh_and_process_group(mesh: DeviceMesh) -> None:
    class Recorder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            name = normcore.distributed.axis_group("op", "data", None)
            return x + (-1 if name is None else int(name))

    step = torch.compile(Recorder(), fullgraph=True, backend="eager")
    x = torch.zeros(1)
    other = DeviceMesh.from_group(dist.new_group([0]), "cpu", mesh_dim_names=("data",))
    names = []
    for active in (mesh, other, mesh):
        with use_mesh(active):
            names.append(str(int(step(x))))
    assert names == [m.get_group("data").group_name for m in (mesh, other, mesh)]
    assert names[0] != names[1]
    dist.destroy_process_group()
    with use_mesh(mesh):
        assert step(x) == -1


# ---- group= of the functions ----


def test_groups_of_functions(mesh: DeviceMesh) -> None:
    x = torch.randn(8, 6)
    want = NF.batch_norm(x, None, None, training=True), NF.group_norm(x, 2)
    own = dist.new_group([0])
    for group in ("world", dist.group.WORLD, own, own.group_name, mesh["data"]):

        def norms(x: Tensor, group: Any = group) -> tuple[Tensor, Tensor]:
            options = {"training": True, "group": group}
            return NF.batch_norm(x, None, None, **options), NF.group_norm(x, 2, group=group)

        for function in (norms, torch.compile(norms, fullgraph=True, backend="aot_eager")):
            torch.testing.assert_close(function(x), want)


def test_errors_of_groups(mesh: DeviceMesh) -> None:
    x = torch.randn(8, 6)
    outside = dist.GroupMember.NON_GROUP_MEMBER
    for group, error, text in (
        (3, TypeError, "group_norm: expected group to be a process group or its name, got 3"),
        (outside, ValueError, "group_norm: .* this rank is not in the group"),
        (mesh, ValueError, r"group_norm: .* of one dimension, got 2: \('data', 'model'\)"),
        ("nobody", ValueError, "group_norm: expected group to be the name .*, got 'nobody'"),
    ):
        with pytest.raises(error, match=f"^{text}"):
            NF.group_norm(x, 2, group=group)


# ---- SyncBatchNorm ----

SIZES = [(4, 6), (4, 6, 5), (4, 6, 3, 2), (2, 6, 3, 4, 2)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"eps": 1e-2, "momentum": 0.7},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"track_running_stats": False, "momentum": None},
]


def test_interface() -> None:
    *parameters, activation = inspect.signature(NN.SyncBatchNorm).parameters.values()
    assert parameters == list(inspect.signature(nn.SyncBatchNorm).parameters.values())
    assert (activation.name, activation.default) == ("activation", None)
    assert issubclass(NN.SyncBatchNorm, nn.modules.batchnorm._BatchNorm)
    assert not issubclass(NN.SyncBatchNorm, nn.SyncBatchNorm)
    norm = NN.SyncBatchNorm(6, 1e-3, 0.2, True, True, None, "cpu", torch.float64)
    assert (norm.eps, norm.momentum, norm.process_group) == (1e-3, 0.2, None)
    assert norm.weight.dtype == torch.float64


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("is_initialized", [False, True])
def test_results_of_one_rank(
    size: tuple[int, ...],
    options: dict[str, Any],
    is_initialized: bool,
    request: pytest.FixtureRequest,
) -> None:
    ours, theirs = pair("SyncBatchNorm", **options)
    assert repr(ours) == repr(theirs)
    modes = (True, False, True)
    inputs = [torch.randn(size, dtype=torch.float64) for _ in modes]
    want = [step(theirs.train(mode), x) for mode, x in zip(modes, inputs)]
    if is_initialized:  # where torch's rejects the CPU
        request.getfixturevalue("world")
    got = [step(ours.train(mode), x) for mode, x in zip(modes, inputs)]
    for g, w in zip(got, want):
        assert_same(g, w)


@pytest.mark.usefixtures("world")
def test_errors() -> None:
    norm = NN.SyncBatchNorm(6)
    state = copy.deepcopy(norm.state_dict())
    for x, text in (
        (torch.randn(6), r"expected at least 2D input \(got 1D input\)"),
        (torch.randn(4, 0), "SyncBatchNorm number of input channels should be non-zero"),
        (torch.randn(1, 6), r"Expected more than 1 value per channel when training, got input"),
    ):
        with pytest.raises(ValueError, match=text):
            norm(x)
    for group, error in ((3, TypeError), (dist.GroupMember.NON_GROUP_MEMBER, ValueError)):
        with pytest.raises(error, match="SyncBatchNorm: expected process_group to be"):
            NN.SyncBatchNorm(6, process_group=group)
    with pytest.raises(ValueError, match=r"expected group to be the name .* got 'nobody'"):
        NN.SyncBatchNorm(6, process_group="nobody")(torch.randn(4, 6))
    assert_same(norm.state_dict(), state)


def test_process_groups(mesh: DeviceMesh) -> None:
    x = torch.randn(4, 6)
    want = nn.BatchNorm1d(6)(x)
    group = dist.new_group([0])
    for given in (None, "world", group, group.group_name, mesh["data"]):
        norm = NN.SyncBatchNorm(6, process_group=given)
        assert norm.process_group is given
        for module in (norm, torch.compile(norm, fullgraph=True, backend="aot_eager")):
            torch.testing.assert_close(module(x), want)


def test_copies_hold_the_name_of_the_group(mesh: DeviceMesh) -> None:
    group = dist.new_group([0])
    for given, name in (
        (None, None),
        ("world", "world"),
        (group, group.group_name),
        (mesh["data"], mesh.get_group("data").group_name),
    ):
        norm = nn.Sequential(NN.SyncBatchNorm(6, process_group=given, activation="relu"))
        file = io.BytesIO()
        torch.save(norm, file)
        file.seek(0)
        for other in (
            copy.deepcopy(norm),
            pickle.loads(pickle.dumps(norm)),
            torch.load(file, weights_only=False),
        ):
            assert other[0].process_group == name
            assert other(torch.randn(4, 6)).min() == 0
        assert norm[0].process_group is given


def test_copies_outlive_the_process_group(world: ProcessGroup) -> None:
    norm = NN.SyncBatchNorm(6, process_group=dist.new_group([0]))
    data = pickle.dumps(norm)
    dist.destroy_process_group()
    assert pickle.dumps(norm) == data
    x = torch.randn(4, 6)
    assert torch.equal(pickle.loads(data)(x), norm(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_torchscript_compiles_evaluation() -> None:
    x = torch.randn(4, 6)
    scripted = torch.jit.script(NN.SyncBatchNorm(6).eval())
    assert torch.equal(scripted(x), nn.BatchNorm1d(6).eval()(x))
    with pytest.raises(torch.jit.Error, match="SyncBatchNorm: training needs Python"):
        scripted.train()(x)


# ---- conversion ----


class Activated(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Named(nn.BatchNorm2d):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.label = "kept"


def network() -> nn.Sequential:
    shared = nn.BatchNorm2d(6, momentum=None)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, 1), shared),
        NN.BatchNorm2d(6, eps=1e-3, activation="relu"),
        nn.SyncBatchNorm(6),
        Named(6),
        nn.BatchNorm2d(6, affine=False, track_running_stats=False),
        normcore.BatchNorm(num_features=6, axis=1),
        nn.InstanceNorm2d(6),
        shared,
    )


@pytest.mark.parametrize(
    "convert", [normcore.convert_sync_batchnorm, NN.SyncBatchNorm.convert_sync_batchnorm]
)
def test_conversion(convert: Any) -> None:
    model = network()
    model[3].eval().weight.requires_grad = False
    model[3].qconfig = "q"
    former = [*model[0], *model[1:]]
    state = {name: (id(t), t) for name, t in model.state_dict(keep_vars=True).items()}
    x = torch.randn(4, 3, 5, 5)
    want = copy.deepcopy(model).eval()(x)

    assert convert(model) is model
    norms = [model[0][1], *model[1:5]]
    assert all(type(norm) is NN.SyncBatchNorm for norm in norms)
    assert model[7] is model[0][1]
    assert [model[0][0], *model[5:7]] == [former[0], *former[6:8]]
    assert model[1].activation == "relu"
    assert (model[3].label, model[3].qconfig, model[3].training) == ("kept", "q", False)
    for norm, other in zip(norms, former[1:]):
        for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
            assert getattr(norm, name) == getattr(other, name)
    assert {n: id(t) for n, t in model.state_dict(keep_vars=True).items()} == {
        name: identity for name, (identity, _) in state.items()
    }
    assert torch.allclose(model.eval()(x), want, atol=1e-6)

    for restored in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        restored[1].eps = 1e-2  # what has been changed stays
        assert normcore.revert(restored) is restored
        kinds = [type(module) for module in (*restored[0], *restored[1:])]
        assert kinds == [type(module) for module in former]
        assert restored[7] is restored[0][1]
        assert (restored[3].label, restored[1].eps) == ("kept", 1e-2)
        assert not hasattr(restored[0][1], "process_group")
        assert restored[2].process_group is None
    assert all(model.state_dict(keep_vars=True)[name] is t for name, (_, t) in state.items())


def test_the_root_is_returned() -> None:
    norm = nn.BatchNorm1d(6)
    converted = normcore.convert_sync_batchnorm(norm)
    assert type(norm) is nn.BatchNorm1d
    assert type(converted) is NN.SyncBatchNorm
    assert converted.weight is norm.weight
    reverted = normcore.revert(converted)
    assert type(reverted) is nn.BatchNorm1d
    assert vars(reverted).keys() == vars(norm).keys()
    assert normcore.revert(norm) is norm
    direct = NN.SyncBatchNorm(6)
    assert normcore.revert(direct) is direct


def test_process_group_of_converted_norms(world: ProcessGroup) -> None:
    group = dist.new_group([0])
    model = normcore.convert_sync_batchnorm(network(), group)
    assert model[1].process_group is group
    again = normcore.convert_sync_batchnorm(model, "world")
    assert again is model
    assert model[1].process_group == "world"
    assert type(normcore.revert(model)[1]) is NN.BatchNorm2d  # not the class in between
    for former in (None, group):
        own = nn.Sequential(nn.SyncBatchNorm(6, process_group=former))
        model = normcore.convert_sync_batchnorm(own, "world")
        for restored in (normcore.revert(copy.deepcopy(model)), normcore.revert(model)):
            assert restored[0].process_group is former  # torch takes no names
    for wrong, error in ((3, TypeError), (dist.GroupMember.NON_GROUP_MEMBER, ValueError)):
        with pytest.raises(error, match="convert_sync_batchnorm: expected process_group"):
            normcore.convert_sync_batchnorm(network(), wrong)


def test_hooks_are_kept() -> None:
    calls = []
    norm = nn.BatchNorm1d(6)
    handle = norm.register_forward_hook(lambda module, *_: calls.append(type(module)))
    converted = normcore.convert_sync_batchnorm(nn.Sequential(norm))
    x = torch.randn(4, 6)
    converted(x)
    handle.remove()
    converted(x)
    assert calls == [NN.SyncBatchNorm]


def test_what_would_be_lost_is_left_alone() -> None:
    patched = nn.BatchNorm1d(6)
    patched.forward = lambda input: input  # type: ignore[method-assign]
    parametrized = nn.utils.parametrizations.weight_norm(nn.BatchNorm1d(6))
    model = nn.Sequential(Activated(6), patched, parametrized)
    modules = list(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        normcore.convert_sync_batchnorm(model)
    assert list(model) == modules
    assert [str(w.message).split(": ")[1] for w in caught] == [
        "Activated '0' has its own forward and stays as it is",
        "BatchNorm1d '1' has its own forward and stays as it is",
        "ParametrizedBatchNorm1d '2' is parametrized and stays as it is",
    ]
    assert all(w.filename == __file__ for w in caught)


@pytest.mark.parametrize("options", [{}, {"affine": False, "track_running_stats": False}])
def test_lazy_norms_have_to_be_initialized(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.LazyBatchNorm1d(**options))
    with pytest.raises(ValueError, match=r"^convert_sync_batchnorm: .* got LazyBatchNorm1d '1'; "):
        normcore.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm1d
    model(torch.randn(4, 6))
    assert all(type(m) is NN.SyncBatchNorm for m in normcore.convert_sync_batchnorm(model))


def test_compiled_modules_are_compiled_anew() -> None:
    norm = nn.BatchNorm1d(6)
    norm.compile(backend="eager")
    converted = normcore.convert_sync_batchnorm(norm)
    calls = []
    converted.register_forward_hook(lambda module, *_: calls.append(module))
    converted(torch.randn(4, 6))
    assert calls == [converted]


# ---- the process ----


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), (None, False)])
def test_debug_sync_is_read_at_import(
    value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("NORMCORE_DEBUG_SYNC", raising=False)
    else:
        monkeypatch.setenv("NORMCORE_DEBUG_SYNC", value)
    code = "import normcore; print(normcore._C.debug_sync())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == str(expected), result.stderr
