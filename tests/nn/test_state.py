# SPDX-License-Identifier: Apache-2.0
"""Queues and memories of all modules that have some: what they are to torch, and that each moves
once per step."""

from __future__ import annotations

import copy
import inspect
import pickle
import socket
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from modules import CASES, process_state, stateful
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import kdkernels as kd
from kdkernels.nn._state import ProcessState

STATEFUL = stateful()
REENTRANT = pytest.mark.parametrize("reentrant", [False, True])
EACH = pytest.mark.parametrize("name", STATEFUL)


def test_every_module_is_a_case() -> None:
    classes = {
        found.__name__
        for found in map(kd.nn.__dict__.get, kd.nn.__all__)
        if inspect.isclass(found) and issubclass(found, nn.Module) and found is not kd.nn.KeyQueue
    }
    assert {name.split()[0] for name in CASES} == classes


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_changes_nothing_but_state_of_the_process(name: str) -> None:
    """Everything else would be written over by DistributedDataParallel, or trained."""
    case = CASES[name]
    module = case.make().double()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    before = {key: value.detach().clone() for key, value in tensors.items()}
    own = {key: value.clone() for key, value in process_state(module).items()}
    for _ in range(2):
        module(*case.inputs(5), **case.options(5))
    for key, value in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
        assert value is tensors[key]
        assert torch.equal(value, before[key]), key
    moved = [key for key, value in process_state(module).items() if not value.equal(own[key])]
    assert bool(moved) == (name in STATEFUL)
    assert not set(own) & {key for key, _ in module.named_buffers()}
    assert set(own) <= set(module.state_dict())


class Plain(nn.Module):
    """The same tensors as buffers."""

    def __init__(self, module: ProcessState) -> None:
        super().__init__()
        for key in module.state_names:
            value = getattr(module, key)
            self.register_buffer(key, None if value is None else value.clone())


def edited(state: dict[str, Tensor], edit: str) -> dict[str, Tensor]:
    state = {key: value.clone() for key, value in state.items()}
    first = next(iter(state))
    if edit == "missing":
        del state[first]
    elif edit == "unexpected":
        state["student_keys_too"] = torch.ones(2)
    elif edit == "shape":
        state[first] = state[first][1:]
    elif edit == "number":
        state[first] = 3
    elif edit == "other dtype":
        state[first] = state[first].half()
    return state


HOLDERS = {
    "queue": lambda: kd.nn.KeyQueue(6, 4),
    "two sides": lambda: kd.nn.KeyQueue(6, 4, student_dim=3, init="empty"),
    "crd": lambda: CASES["CRDLoss"].make(),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(
    "edit", ["nothing", "missing", "unexpected", "shape", "number", "other dtype"]
)
def test_state_loads_like_buffers(holder: str, edit: str, strict: bool, assign: bool) -> None:
    module, other = HOLDERS[holder](), HOLDERS[holder]()
    plain = Plain(module)
    results = []
    for one, source in ((module, other), (plain, Plain(other))):
        state = {k: v for k, v in source.state_dict().items() if not k.startswith("embed_")}
        layers = {k: v for k, v in one.state_dict().items() if k.startswith("embed_")}
        state = {**edited(state, edit), **layers}
        try:
            found = one.load_state_dict(state, strict=strict, assign=assign)
        except RuntimeError as error:
            found = str(error).replace(type(one).__name__, "")
        kept = [one.state_dict()[key] for key in plain.state_dict()]
        if assign and edit == "nothing":
            assert all(a.data_ptr() == state[k].data_ptr() for k, a in one.state_dict().items())
        results.append((found, kept))
    assert results[0][0] == results[1][0]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert not list(module.buffers())


@pytest.mark.parametrize("holder", HOLDERS)
def test_state_moves_like_buffers(holder: str) -> None:
    module = HOLDERS[holder]()
    plain = Plain(module)
    steps: list[Any] = [
        lambda x: x.double(),
        lambda x: x.half(),
        lambda x: x.to(torch.bfloat16),
        lambda x: x.float(),
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: x.to("meta"),
        lambda x: x.to_empty(device="cpu"),
    ]
    for step in steps:
        module, plain = step(module), step(plain)
        for key, value in plain.state_dict().items():
            found = getattr(module, key)
            assert (found.dtype, found.device) == (value.dtype, value.device)
            if value.device.type == "cpu" and step is not steps[-1]:
                torch.testing.assert_close(found, value, rtol=0, atol=0, equal_nan=True)
    assert not list(module.buffers())


def test_modules_pickled_with_buffers_are_read() -> None:
    queue = kd.nn.KeyQueue(6, 4)
    state = queue.__getstate__()
    del state["_forwards"], state["_last_move"]
    state["_buffers"] = {key: state.pop(key) for key in queue.state_names}
    again = kd.nn.KeyQueue.__new__(kd.nn.KeyQueue)
    again.__setstate__(state)
    again.enqueue(torch.ones(2, 4))
    assert torch.equal(again.keys[2:], queue.keys[2:])
    assert not list(again.buffers())


def backward(loss: Tensor, module: nn.Module, *students: Tensor) -> dict[str, Tensor]:
    """The loss, all gradients, and the state after it."""
    sources = {f"student {i}": x for i, x in enumerate(students)}
    sources |= {key: x for key, x in module.named_parameters() if x.requires_grad}
    for x in sources.values():
        x.grad = None
    loss.backward()
    grads = {key: x.grad.clone() for key, x in sources.items()}
    return {"loss": loss.detach(), **grads, **state_of(module)}


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {f"state {key}": value.clone() for key, value in process_state(module).items()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def batch(name: str, B: int = 6) -> tuple[Tensor, ...]:
    student, *others = CASES[name].inputs(B)
    return student.requires_grad_(), *others


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Two modules that are the same."""
    module = CASES[name].make().double()
    return module, copy.deepcopy(module)


@EACH
@REENTRANT
@pytest.mark.parametrize("update", [True, False])
def test_a_forward_that_is_computed_again_is_the_same(
    name: str, reentrant: bool, update: bool
) -> None:
    """Value, gradients and state, with batches of several sizes."""
    plain, module = pair(name)
    for B in (6, 6, 4, 6):
        args, seed = batch(name, B), torch.get_rng_state()
        wanted = backward(plain(*args, update=update), plain, args[0])
        torch.set_rng_state(seed)
        loss = checkpoint(lambda *x: module(*x, update=update), *args, use_reentrant=reentrant)
        assert_equal(backward(loss, module, args[0]), wanted)


@EACH
@REENTRANT
def test_nothing_is_drawn_again(name: str, reentrant: bool) -> None:
    """Not even where random numbers are not kept for it."""
    plain, module = pair(name)
    args, seed = batch(name), torch.get_rng_state()
    wanted = backward(plain(*args), plain, args[0])
    torch.set_rng_state(seed)
    loss = checkpoint(module, *args, use_reentrant=reentrant, preserve_rng_state=False)
    assert_equal(backward(loss, module, args[0]), wanted)


@EACH
@REENTRANT
@pytest.mark.parametrize("same", ["all", "teacher", "nothing"])
def test_two_forwards_before_one_backward(name: str, reentrant: bool, same: str) -> None:
    """The gradients are right, or it is refused."""
    plain, module = pair(name)
    first, second = batch(name), batch(name)
    if same != "nothing":
        second = (second[0], *first[1:]) if same == "teacher" else first
    seed = torch.get_rng_state()
    students = (first[0],) if same == "all" else (first[0], second[0])
    wanted = backward(plain(*first) + plain(*second), plain, *students)
    torch.set_rng_state(seed)
    losses = [checkpoint(module, *args, use_reentrant=reentrant) for args in (first, second)]
    after = state_of(module)
    try:
        found = backward(losses[0] + losses[1], module, *students)
    except RuntimeError as error:
        assert "Call backward before the next forward" in str(error)  # noqa: PT017
        found = wanted
    torch.testing.assert_close(found, wanted)
    assert_equal(state_of(module), after)


@EACH
@REENTRANT
def test_two_views_in_one_block(name: str, reentrant: bool) -> None:
    """The first view without an update, the second with one."""
    plain, module = pair(name)
    first, second = batch(name), batch(name)

    def both(one: nn.Module, *args: Tensor) -> Tensor:
        half = len(args) // 2
        return one(*args[:half], update=False) + one(*args[half:])

    seed = torch.get_rng_state()
    wanted = backward(both(plain, *first, *second), plain, first[0], second[0])
    torch.set_rng_state(seed)
    loss = checkpoint(lambda *x: both(module, *x), *first, *second, use_reentrant=reentrant)
    found = backward(loss, module, first[0], second[0])
    torch.testing.assert_close(found, wanted, equal_nan=True)


@EACH
@REENTRANT
def test_a_backward_after_the_state_has_moved_on_is_refused(name: str, reentrant: bool) -> None:
    module = CASES[name].make().double()
    args = batch(name)
    loss = checkpoint(module, *args, use_reentrant=reentrant)
    for _ in range(2):  # not in a block, as a step of validation in training mode would
        module(*batch(name))
    before = state_of(module)
    with pytest.raises(RuntimeError, match=r"inside a backward pass, .* moved on since"):
        loss.backward()
    assert_equal(state_of(module), before)


@EACH
def test_without_an_update_the_value_is_the_same_and_nothing_moves(name: str) -> None:
    module = CASES[name].make().double()
    module(*CASES[name].inputs(6))
    args, before, seed = batch(name), state_of(module), torch.get_rng_state()
    found = backward(module(*args, update=False), module, args[0])
    assert_equal({key: found[key] for key in before}, before)
    torch.set_rng_state(seed)
    wanted = backward(module(*args), module, args[0])
    for key in wanted.keys() - before.keys():
        torch.testing.assert_close(found[key], wanted[key])
    assert any(not wanted[key].equal(before[key]) for key in before)
    with pytest.raises(TypeError, match="update must be True or False, got int"):
        module(*args, update=1)


@EACH
@pytest.mark.parametrize("where", ["around", "inside"])
@REENTRANT
def test_compiled_code_does_not_move_it_again(name: str, where: str, reentrant: bool) -> None:
    """It cannot know what is computed again; it refuses."""
    plain, module = pair(name)
    args, seed = batch(name), torch.get_rng_state()
    wanted = backward(plain(*args), plain, args[0])
    torch.set_rng_state(seed)
    torch._dynamo.reset()
    if where == "around":
        compiled = torch.compile(module, backend="aot_eager")
        loss = checkpoint(compiled, *args, use_reentrant=reentrant)
    else:
        loss = torch.compile(
            lambda *x: checkpoint(module, *x, use_reentrant=reentrant), backend="aot_eager"
        )(*args)
    after = state_of(module)
    try:
        found = backward(loss, module, args[0])
    except RuntimeError as error:
        assert "a second time inside a backward pass" in str(error)  # noqa: PT017
        found = wanted
    torch.testing.assert_close(found, wanted, equal_nan=True)
    assert_equal(state_of(module), after)


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
@EACH
def test_compiled_steps_are_one_graph(name: str, backend: str) -> None:
    eager, module = pair(name)
    graphs = []

    def counted(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, examples)

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=counted, fullgraph=True)
    for step in range(4):
        args, seed = batch(name), torch.get_rng_state()
        found = backward(compiled(*args), module, args[0])
        torch.set_rng_state(seed)
        wanted = backward(eager(*args), eager, args[0])
        if name != "CRDLoss draws":  # aot_eager draws in an order of its own
            torch.testing.assert_close(found, wanted)
        assert len(graphs) == 1, step


def test_a_queue_in_a_block_of_your_own_enqueues_once() -> None:
    queue, again = kd.nn.KeyQueue(9, 4), None
    again = copy.deepcopy(queue)

    def loss(queue: kd.nn.KeyQueue, student: Tensor, teacher: Tensor) -> Tensor:
        places = queue.enqueue(teacher)
        return kd.relational_kl(student, teacher, queue.keys, exclude=places)

    for reentrant in (False, True):
        student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
        loss(queue, student, teacher).backward()
        wanted, student.grad = student.grad, None
        checkpoint(loss, again, student, teacher, use_reentrant=reentrant).backward()
        assert torch.equal(student.grad, wanted)
        assert torch.equal(queue.keys, again.keys)
        assert queue.next == again.next
        late = checkpoint(loss, again, student, teacher, use_reentrant=reentrant)
        for one in (queue, again):
            one.enqueue(torch.randn(5, 4))
        with pytest.raises(RuntimeError, match="these rows were not the last to be enqueued"):
            late.backward()
        queue.load_state_dict(again.state_dict())


def test_what_is_kept_for_a_second_forward_is_little_and_goes_with_no_copy() -> None:
    """Nothing in plain training or evaluation; in blocks, what the next backward may need."""
    module = CASES["CRDLoss"].make().double()
    for _ in range(3):
        module(*batch("CRDLoss")).backward()
    with torch.no_grad():
        module.eval()(*batch("CRDLoss"))
    assert not module._forwards
    module.train()
    for _ in range(3):
        checkpoint(module, *batch("CRDLoss"), use_reentrant=False).backward()
    assert len(module._forwards) == 1
    assert not copy.deepcopy(module)._forwards
    assert not pickle.loads(pickle.dumps(module))._forwards


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.crd = nn.Linear(4, 4), kd.nn.CRDLoss(4, 4, 32, num_negatives=8, dim=8)
        self.rrd = kd.nn.RelationalRepresentationLoss(4, 4, dim=8, queue_size=8)

    def forward(self, x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        s = self.net(x)
        return self.crd(s, t, index) + self.rrd(s, t)


def _epoch(rank: int, world: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, world, rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.manual_seed(0)
    model = DistributedDataParallel(Model())
    state = {key: value.clone() for key, value in process_state(model.module).items()}
    mine = torch.arange(rank, 32, world)
    for part in (*mine.split(4), mine[:4]):
        torch.manual_seed(rank)
        model(torch.randn(4, 4), torch.randn(4, 4), part).backward()
    after = process_state(model.module)
    moved = (after["crd.teacher_memory"] != state["crd.teacher_memory"]).any(1).nonzero()[:, 0]
    results[rank] = (moved.tolist(), mine.tolist(), after["rrd.queue.keys"].tolist())
    torch.distributed.destroy_process_group()


def test_each_process_has_its_own_under_distributed_data_parallel() -> None:
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(_epoch, args=(2, port, results), nprocs=2)
        (first, mine, keys), (second, others, other_keys) = results[0], results[1]
    assert first == mine
    assert second == others
    assert keys != other_keys
