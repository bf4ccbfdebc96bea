"""A parameter whose gradients are summed over another axis than the others', as an expert's are, is trained as in one process.

On 4 ranks, dp 2 x cp 2, the dense parameters are copies on all of them. The experts are cut over cp, two to a rank, and have
copies on the two ranks of dp alone.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from source_files import ROOT, shown, tree
from torch import Tensor, nn

from megatron.config.schema import OptimSettings
from megatron.mesh.grid import MESH_AXES, Grid, complementary_axes, is_within_stage
from megatron.mesh.mesh import Mesh
from megatron.optim import buffers as optim_buffers
from megatron.optim.buffers import flat_buffers
from megatron.optim.optimizer import Optimizer
from megatron.parallel.spec import ParameterSpec, Part, describe

EXPERTS, HIDDEN, TOKENS, STEPS = 4, 6, 8, 3
DATA = 4  # parts of the data, whatever the layout


@dataclass(frozen=True)
class Case:
    """A layout of the run. data_axis: what the experts' specs say of it."""

    sharded: bool = False
    overlap: bool = False
    bucket: int | None = None
    data_axis: str = "dp"


class Experts(nn.Module):
    """A dense layer with a bias, then a matrix for each expert; token t goes to expert t modulo EXPERTS."""

    def __init__(self, mesh: Mesh, data_axis: str) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        own = EXPERTS // mesh.cp.size
        self.first = mesh.cp.rank * own
        whole = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=draw)
        part = Part((self.first, 0, 0), (own, HIDDEN, HIDDEN))
        expert = ParameterSpec("experts", tuple(whole.shape), part, frozenset({"cp"}), data_axis=data_axis)
        dense, bias = torch.randn(HIDDEN, HIDDEN, generator=draw), torch.randn(HIDDEN, generator=draw)
        self.dense = describe(nn.Parameter(dense), ParameterSpec("dense", tuple(dense.shape), Part.whole(tuple(dense.shape))))
        self.bias = describe(nn.Parameter(bias), ParameterSpec("bias", (HIDDEN,), Part.whole((HIDDEN,)), decay=False))
        self.experts = describe(nn.Parameter(whole[expert.part.slices].clone()), expert)


def make_hidden(step: int, part: int) -> Tensor:
    """`[TOKENS, HIDDEN]`, of one part of the data."""
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(100 * step + part))


def backward(model: Experts, mesh: Mesh, step: int) -> None:
    """The gradients of this rank's work.

    The dense layer sees this rank's parts of the data. An expert sees what the ranks of its cp send it: here made
    again, without gradients, since the toy has no exchange of tokens.
    """
    ranks = mesh.dp_cp.size
    parts = range(mesh.dp_cp.rank * DATA // ranks, (mesh.dp_cp.rank + 1) * DATA // ranks)
    sent = range(mesh.dp.rank * DATA // mesh.dp.size, (mesh.dp.rank + 1) * DATA // mesh.dp.size)
    hidden = sum(((make_hidden(step, part) @ model.dense + model.bias).tanh().sum() for part in parts), torch.zeros(()))
    expert = torch.zeros(())
    for part in sent:
        x = make_hidden(step, part).view(TOKENS // EXPERTS, EXPERTS, HIDDEN)[:, model.first : model.first + len(model.experts)]
        expert = expert + torch.einsum("teh,ehk->tek", x, model.experts).tanh().sum()
    (hidden + expert).backward()


Rectangles = list[tuple[str, tuple[slice, ...], Tensor]]


def train(case: Case, steps: int = STEPS) -> tuple[list[tuple[float, float]], Rectangles, list[tuple[str, int, int]]]:
    """Norms of gradients and parameters at each step; this rank's main weights and moments; axis and ranks of each bucket."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    mesh = Mesh.build(Grid(dp=2, cp=2), dist.get_rank()) if world > 1 else Mesh.single()
    model = Experts(mesh, case.data_axis)
    flat = flat_buffers(model.parameters(), case.bucket, mesh, sharded=case.sharded)
    config = OptimSettings(clip_grad=1.0)
    optimizer = Optimizer(flat, config, mesh, log_params_norm=True, overlap_grad_reduce=case.overlap)
    norms = []
    for step in range(steps):
        optimizer.zero(1)
        backward(model, mesh, step)
        report = optimizer.step(lr=0.1, weight_decay=0.01, scale=1.0 / (DATA * TOKENS))
        norms.append((report.grad_norm, report.params_norm or 0.0))
    held = [(s.name, s.part.slices, s.data.clone()) for b in flat for s in b.shards(b.main, "main.")]
    held += [(s.name, s.part.slices, s.data.clone()) for s in optimizer.shards()]
    return norms, held, [(b.data_axis.name, b.data_axis.size, b.owners.size) for b in flat]


def distance(held: list[Rectangles], whole: Rectangles) -> float:
    """The largest difference of the ranks' rectangles from one process's tensors, which they must cover."""
    joined = {name: torch.full_like(values, torch.nan) for name, _, values in whole}
    for name, where, values in (each for rank in held for each in rank):
        joined[name][where] = values
    worst = [float((joined[name] - values).abs().max()) for name, _, values in whole]
    return max(worst) if not any(values.isnan().any() for values in joined.values()) else float("inf")


@pytest.mark.parametrize("bucket", [None, 16])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_experts_have_a_data_axis_of_their_own(sharded: bool, overlap: bool, bucket: int | None) -> None:
    case = Case(sharded, overlap, bucket)
    expected, whole, _ = train(replace(case, sharded=False))
    results = on_ranks(4, train, case)
    for norms, _, kinds in results:
        assert norms == [pytest.approx(each, rel=1e-6) for each in expected]
        assert set(kinds) == {("dp", 2, 2 if sharded else 1), ("dp_cp", 4, 4 if sharded else 1)}
    assert distance([held for _, held, _ in results], whole) < 1e-5
    # Without slices each copy is whole, on every rank that holds one.
    sizes = {name: [sum(v.numel() for n, _, v in held if n == name) for _, held, _ in results] for name, _, _ in whole}
    shares = {"experts": 2 * (2 if sharded else 1), "dense": 4 if sharded else 1, "bias": 4 if sharded else 1}
    for name, _, values in whole:
        assert sum(sizes[name]) * shares[name.split(".")[1]] == 4 * values.numel()


@pytest.mark.parametrize("sharded", [False, True])
def test_an_expert_summed_over_the_wrong_ranks_is_another_run(sharded: bool) -> None:
    """Show that the tolerances above can fail: summed over all ranks, each expert has another one's gradient in its own."""
    expected, _, _ = train(Case())
    for norms, _, _ in on_ranks(4, train, Case(sharded, data_axis="dp_cp")):
        assert abs(norms[0][0] / expected[0][0] - 1.0) > 1e-2


def test_an_axis_that_the_mesh_does_not_have_is_refused() -> None:
    weight = describe(nn.Parameter(torch.zeros(2)), ParameterSpec("w", (2,), Part.whole((2,)), data_axis="expert"))
    with pytest.raises(ValueError, match="the mesh has no axis expert; it has tp, cp, dp, pp, dp_cp, world"):
        flat_buffers([weight], mesh=Mesh.single())


def test_the_axes_beside_a_data_axis_span_a_stage() -> None:
    assert complementary_axes("dp_cp") == {"tp"} and complementary_axes("dp") == {"cp", "tp"}
    assert [name for name in (*MESH_AXES, "embedding", "pp_back") if is_within_stage(name)] == ["tp", "cp", "dp", "dp_cp"]


# No axis is named in the optimizer's room: neither asked for nor compared with.


def axis_names() -> set[str]:
    return {name for name in Mesh.__annotations__ if name not in ("grid", "rank")} | set(MESH_AXES)


def named_axes(path: Path, names: set[str]) -> list[str]:
    """Find where a file has an axis's name as a text of its own, or asks something for an attribute of that name."""
    found = []
    for node in ast.walk(tree(path)):
        text = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
        if text or (isinstance(node, ast.Attribute) and node.attr in names):
            found.append(shown(path, node))
    return found


def test_the_optimizer_knows_no_axis_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = axis_names() - {"world"}  # all ranks there are: no axis that a parameter could name
    assert {"tp", "dp_cp", "embedding"} <= names
    folder = ROOT / "megatron" / "optim"
    paths = sorted(folder.rglob("*.py"))
    assert Path(optim_buffers.__file__) in paths
    assert not [line for path in paths for line in named_axes(path, names)]
    monkeypatch.setattr("source_files.ROOT", tmp_path)
    bad = tmp_path / "bad.py"
    for line in ("x = mesh.tp.first", "x = 'embedding' in spec.sum_grad_over", "def f(axis='dp_cp'): ..."):
        bad.write_text(line)
        assert named_axes(bad, names), line
