"""Messages between ranks that are under way while they do other things: never lost, never mixed up."""

import warnings
from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hsu import UniformityRegularizer
from lightning_hsu._engine import sharing
from lightning_hsu._neurons.placement import ReplicatedPlacement, replicated
from tests import processes, ranks
from tests.plain import HALF_SPACE
from tests.processes import world
from tests.ranks import End, max_difference, same_bits

TOLERANCE = 1e-6  # measured: 5e-8

pytestmark = pytest.mark.slow


class Events(TorchDispatchMode):
    """Notes when a rank computes products, begins messages and waits for them."""

    def __init__(self):
        super().__init__()
        self.found, self.begun, self.waited = [], 0, set()
        self.in_group_of_ddp = (
            set()
        )  # whether messages were, and not the group itself, which would go on

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm_", "baddbmm", "baddbmm_"):
            self.note("compute")
        return func(*args, **(kwargs or {}))

    def note(self, event):
        if self.found[-1:] != [event]:
            self.found.append(event)

    def taken(self):
        """What has happened since this was last asked."""
        found, self.found = self.found, []
        return found

    @contextmanager
    def messages(self):
        """Within the block messages are noted."""
        send, broadcast = ReplicatedPlacement.send, distributed.broadcast

        def sent(placement, some, **settings):
            if some:
                self.note("begin")
            return [self._noted(wait) for wait in send(placement, some, **settings)]

        def in_group(*args, **settings):
            self.in_group_of_ddp.add(settings["group"] is distributed.group.WORLD)
            return broadcast(*args, **settings)

        with (
            mock.patch.object(ReplicatedPlacement, "send", sent),
            mock.patch.object(distributed, "broadcast", in_group),
        ):
            yield

    def _noted(self, wait):
        number = self.begun
        self.begun += 1

        def noted():
            self.note("wait")
            self.waited.add(number)
            wait()

        return noted


def network():
    """Layers that are shared, and two that are not worth it."""
    torch.manual_seed(0)
    widths = (8, 40, 36, 32, 5, 70)
    layers = [nn.Linear(d, n) for d, n in pairwise(widths)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))


class Training:
    """A training of which each part is called by itself; alone, or on ranks."""

    def __init__(self, **settings):
        self.net, self.x = network(), torch.randn(12, 8)
        self.rank, size, self.model = 0, 1, self.net
        if distributed.is_initialized():
            self.rank, size = distributed.get_rank(), distributed.get_world_size()
            self.model = DistributedDataParallel(self.net)
        self.x = self.x[self.rank :: size]
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        settings = {"measure": HALF_SPACE, "coefficient": 0.5, "head": None} | settings
        self.regularizer = UniformityRegularizer(**settings).attach(self.model)

    def backward(self):
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()

    def add(self, **settings):
        self.regularizer.add_gradients(self.optimizer, **settings)

    def step(self):
        self.backward()
        self.add()
        self.optimizer.step()

    def look(self):
        self.regularizer.look_ahead(self.optimizer)


def sharing_large_layers():
    return mock.patch.object(sharing, "worth_sharing", return_value=20_000.0)


def events_of_steps(settings):
    """What a rank does at the second step, and with gradients that are computed ahead at the third."""
    events = Events()
    with sharing_large_layers():
        training = Training(**settings)
        training.step()
        training.backward()
        with events.messages(), events:
            training.add()
        found = [events.taken()]
        in_group_of_ddp = set(events.in_group_of_ddp)
        training.optimizer.step()
        with events.messages(), events:
            training.look()
        found.append(events.taken())
        training.backward()
        with events.messages(), events:
            training.add()
        found.append(events.taken())
        return found, in_group_of_ddp


@pytest.mark.parametrize("settings", [{}, {"tolerance": 1e-9}], ids=str)
def test_messages_are_under_way_while_a_rank_computes_its_own_layers(settings):
    for found, in_group_of_ddp in world(2).run(events_of_steps, settings):
        assert found[0] == ["compute", "begin", "compute", "wait"]
        assert in_group_of_ddp == {True}
        assert found[1:] == [["compute", "begin", "compute"], ["wait"]]  # ahead, and within a step


def ahead_of_ddp():
    """Groups of the messages that are under way during a backward pass; groups before and after."""
    known = distributed.distributed_c10d._world.pg_map
    before, events = len(known), Events()
    as_with_nccl = mock.patch.object(replicated, "_has_stream", return_value=True)
    with sharing_large_layers(), events.messages(), as_with_nccl:
        training = Training()
        training.step()
        events.in_group_of_ddp.clear()
        for _ in range(2):
            training.look()
            training.step()
        within = len(known) - before
        placement = training.regularizer._attached.placement
        timeout = placement._beside._get_backend(torch.device("cpu")).options._timeout
        training.regularizer.detach()
        return events.in_group_of_ddp, within, len(known) - before, timeout


@pytest.mark.skipif(
    torch.__version__ < (2, 9), reason="a group of gloo may hang as it ends: pytorch/pytorch#154976"
)
def test_messages_that_ddp_must_not_wait_for_have_a_group_of_their_own():
    for in_group_of_ddp, more, left, timeout in world(2).run(ahead_of_ddp):
        assert in_group_of_ddp == {False}
        assert (more, left) == (1, 0)
        assert timeout.total_seconds() == 60  # that of tests/processes.py, not torch's default


def a_step_that_never_came(training):
    training.look()
    training.look()


def a_skipped_step(training):
    """As by a GradScaler: nothing tells that it was one."""
    training.look()
    training.backward()
    training.add()


def an_error_in_a_step(training):
    training.look()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        training.model(torch.randn(3, 9))


def a_closure(training):
    training.look()
    training.backward()
    training.add()
    with torch.no_grad():
        training.net[0].weight.mul_(1.01)
    training.backward()
    training.add(same_step=True)


def a_checkpoint(training):
    training.look()
    training.regularizer.load_state_dict(training.regularizer.state_dict())


def another_attach(training):
    training.look()
    training.regularizer.attach(training.model)


def one_rank_leaves_layers_out(training):
    """As after changes that torch does not count there."""
    training.look()
    if training.rank == 1:
        attached = training.regularizer._attached
        with warnings.catch_warnings(action="ignore"):
            attached.ahead.leave_out([layer for layer in attached.layers if layer.name in "24"])


def interrupted(interruption, tolerance):
    """The end of a training, and how many messages were begun, and not waited for."""
    events = Events()
    with sharing_large_layers(), events.messages():
        training = Training(tolerance=tolerance)
        for step in range(6):
            training.step()
            if step % 2:
                interruption(training)
            else:
                training.look()
        training.regularizer.detach()
    return End(ranks.whole_tensors(training.net)), events.begun, events.begun - len(events.waited)


@pytest.mark.filterwarnings("ignore:layer '2' .* has new weights")
@pytest.mark.parametrize("tolerance", [None, 0.1])
@pytest.mark.parametrize(
    "interruption",
    [
        a_step_that_never_came,
        a_skipped_step,
        an_error_in_a_step,
        a_closure,
        a_checkpoint,
        another_attach,
        one_rank_leaves_layers_out,
    ],
    ids=lambda interruption: interruption.__name__,
)
def test_every_message_that_is_begun_is_waited_for(interruption, tolerance):
    alone, begun, _ = interrupted(interruption, tolerance)
    assert begun == 0
    answers = world(2).run(interrupted, interruption, tolerance)
    assert [left for _, _, left in answers] == [0, 0]
    assert answers[0][1] == answers[1][1] > 0
    for end, _, _ in answers:
        assert max_difference(end, alone) < TOLERANCE
    assert same_bits([end for end, _, _ in answers])


def fails_ahead_on_one():
    """The errors of the step after one rank could not compute ahead, and whether the next one is right."""
    compute, events = sharing.add_all_pair_gradients, Events()

    def failing(by_term):
        if distributed.get_rank() == 1 and training.regularizer.state.counter.done == [1]:
            raise ArithmeticError("no more")
        compute(by_term)

    with sharing_large_layers(), events.messages():
        training = Training()
        training.step()
        with mock.patch.object(sharing, "add_all_pair_gradients", failing):
            looked = ranks.error_of(training.look)
            training.backward()
            error = ranks.error_of(training.add)
        training.step()
        training.regularizer.detach()
    weights = ranks.whole_tensors(training.net)
    return looked, error, End(weights), events.begun - len(events.waited)


def test_an_error_ahead_is_told_at_the_step_and_leaves_no_message_behind():
    first, second = world(2).run(fails_ahead_on_one)
    assert first[0] is None
    assert second[0] is None
    assert first[1].startswith(
        "RuntimeError: rank 1 could not compute the penalty's gradient of its"
    )
    assert second[1] == "ArithmeticError: no more"
    assert same_bits([first[2], second[2]])
    assert first[3] == second[3] == 0


def with_uneven_batches(tolerance, share_work, ahead):
    """The end of a training of which rank 1 has fewer batches, and the messages within ``Join``."""
    events = Events()
    with sharing_large_layers(), events.messages():
        training = Training(tolerance=tolerance, share_work=share_work)
        training.step()
        if ahead:
            training.look()
        before = events.begun
        with Join([training.model]):
            for _ in range(5 - 2 * training.rank):
                training.step()
                if ahead:
                    training.look()
        training.regularizer.detach()
    weights = ranks.whole_tensors(training.net)
    return End(weights), before, events.begun - before, events.begun - len(events.waited)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("tolerance", [None, 0.1])
def test_ranks_with_uneven_batches_do_not_wait_for_one_another(tolerance, ahead):
    with mock.patch.object(processes, "SECONDS", 20):
        answers = world(2).run(with_uneven_batches, tolerance, True, ahead)
        expected = world(2).run(with_uneven_batches, tolerance, False, ahead)
    assert same_bits([answer[0] for answer in answers])
    for end, before, within, left in answers:
        assert before > 0
        assert (within, left) == (0, 0)
        assert max_difference(end, expected[0][0]) < TOLERANCE


def after_uneven_batches(tolerance):
    """The weights some steps after ``Join``, in which rank 1 took fewer steps."""
    training = Training(tolerance=tolerance)
    for group in training.optimizer.param_groups:
        group["momentum"] = 0.0  # which would be another on each rank
    for _ in range(2):
        with Join([training.model]):
            for _ in range(5 - 2 * training.rank):
                training.step()
        for _ in range(4):
            training.step()
    training.regularizer.detach()
    return End(ranks.whole_tensors(training.net))


@pytest.mark.parametrize("tolerance", [None, 0.1])
def test_ranks_go_on_alike_after_uneven_batches(tolerance):
    """What each has kept would be of other steps, and due at others."""
    with mock.patch.object(processes, "SECONDS", 20):
        assert same_bits(world(2).run(after_uneven_batches, tolerance))


def swapped_on_one(tolerance):
    """What a step does after rank 1 had other weights for a while, as for an evaluation."""
    events = Events()
    with sharing_large_layers():
        training = Training(tolerance=tolerance)
        training.step()
        training.look()
        if training.rank == 1:
            with torch.no_grad():
                own = [p.clone() for p in training.net.parameters()]
                for p, before in zip(training.net.parameters(), own, strict=True):
                    p.mul_(0.5)
                    p.copy_(before)
        training.backward()
        with events:
            training.add()
        training.regularizer.detach()
    return events.taken()


@pytest.mark.parametrize("tolerance", [None, 1e-9])
def test_weights_that_are_taken_back_on_one_rank_need_no_other_gradient(tolerance):
    """By its own it would have other last bits, and might compute layers at other steps than the others."""
    assert world(2).run(swapped_on_one, tolerance) == [[], []]
