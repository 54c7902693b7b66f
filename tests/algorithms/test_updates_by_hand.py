"""One-parameter models whose updates can be done by hand: L_k(w) = (w - t_k)^2 / 2, so the gradient is w - t_k."""

import math

import pytest
import torch

from fedftg.algorithms.base import ClientResult, LocalTask, ServerState
from fedftg.algorithms.fedacg import FedACGConfig
from fedftg.algorithms.fedavg import FedAvgConfig
from fedftg.algorithms.fedavgm import FedAvgMConfig
from fedftg.algorithms.feddyn import FedDynConfig
from fedftg.algorithms.fedprox import FedProxConfig
from fedftg.algorithms.fedvarp import FedVARPConfig
from fedftg.algorithms.moon import MoonConfig, contrastive
from fedftg.algorithms.scaffold import ScaffoldConfig

LR = 0.5


def state(value, server):
    return ServerState(0, {"w": torch.tensor([value])}, {}, server, {})


def task(now, algorithm, memory, relative_size=1.0):
    return LocalTask(1, 0, now.params, {}, memory, algorithm.server.message(now), 1, relative_size, LR, 0)


def descend(algorithm, todo, target, steps):
    """Plain gradient steps with the rule's correction; returns parameters, extra upload and new memory."""
    params = dict(todo.params)
    for _ in range(steps):
        grads = algorithm.local.correct({"w": params["w"] - target}, params, todo)
        params = {"w": params["w"] - LR * grads["w"]}
    extra, memory = algorithm.local.finish(params, {}, todo, steps)
    return params, extra, memory


def result(client, value, size=1, extra=None):
    return ClientResult(client, size, torch.ones(2), {"w": torch.tensor([value])}, {}, extra or {}, {}, 0.0)


def step(algorithm, now, results):
    return algorithm.server.step(now, results)[0]


def test_fedavg_weights_by_samples():
    """(1*0 + 3*8) / 4 = 6; uniform gives 4."""
    results = [result(0, 0.0, 1), result(1, 8.0, 3)]
    algorithm = FedAvgConfig().build(2)
    after, metrics = algorithm.server.step(state(5.0, {}), results)
    assert after.params["w"].item() == 6.0
    assert metrics == {"update_norm": 1.0}
    assert step(FedAvgConfig(weighting="uniform").build(2), state(5.0, {}), results).params["w"].item() == 4.0


def test_fedprox_pulls_to_the_received_model():
    """From a = 2 to target 6 with mu = 1, rate 0.5.

    Step 1: g = 2 - 6 + 1 * (2 - 2) = -4, w = 4. Step 2: g = 4 - 6 + 1 * (4 - 2) = 0, w = 4: half-way, as the minimum
    of (w - 6)^2 / 2 + (w - 2)^2 / 2 says. A pull to zero would give g = -4 + 2 = -2 in step 1.
    """
    algorithm = FedProxConfig(mu=1).build(2)
    params, _, _ = descend(algorithm, task(state(2.0, {}), algorithm, {}), target=6.0, steps=2)
    assert params["w"].item() == 4.0


def test_feddyn_by_hand():
    """alpha = 1, rate 0.5, two of N = 2 clients, from a = 0.

    Client 0, target 4, no drift: g = -4, w = 2; g = -2 + (2 - 0) = 0, w = 2. Drift d_0 = 2.
    Client 1 reports -1, drift -1. Server: drift = (2 - 1) / 2 = 0.5; w = mean(2, -1) + 0.5 = 1.
    Next round client 0 from a = 1 with d = 2: g = (1 - 4) + (0 + 2) = -1, w = 1.5; d = 2 + 0.5 = 2.5.
    """
    algorithm = FedDynConfig(alpha=1).build(2)
    start = state(0.0, algorithm.server.init({"w": torch.zeros(1)}))
    first = task(start, algorithm, algorithm.local.init_memory(start.params, {}))
    params, _, memory = descend(algorithm, first, target=4.0, steps=2)
    assert (params["w"].item(), memory["w"].item()) == (2.0, 2.0)
    after = step(algorithm, start, [result(0, 2.0), result(1, -1.0)])
    assert (after.server["w"].item(), after.params["w"].item()) == (0.5, 1.0)
    params, _, memory = descend(algorithm, task(after, algorithm, memory), target=4.0, steps=1)
    assert (params["w"].item(), memory["w"].item()) == (1.5, 2.5)


def test_feddyn_counts_absent_clients_and_divides_alpha_by_relative_size():
    """One of N = 4 clients moved by 2: drift = 2 / 4. A client of double size has half the alpha: 1 * 0.5 * (3 - 1)."""
    algorithm = FedDynConfig(alpha=1).build(4)
    start = state(1.0, {"w": torch.zeros(1)})
    assert step(algorithm, start, [result(0, 3.0)]).server["w"].item() == 0.5
    todo = task(start, algorithm, {"w": torch.zeros(1)}, relative_size=2.0)
    assert algorithm.local.correct({"w": torch.zeros(1)}, {"w": torch.tensor([3.0])}, todo)["w"].item() == 1.0


def test_scaffold_by_hand():
    """Rate 0.5, N = 4. From a = 0 to target 4 with c = 1, c_0 = 3: g = -4 + 1 - 3 = -6, w = 3.

    Option II after one step: c_0+ = c_0 - c + (a - w) / (1 * 0.5) = 3 - 1 - 6 = -4, so the upload is -7.
    Server with two clients at 3 and 1 that upload -7 and 1: w = mean = 2, c = 1 + 2/4 * (-3) = -0.5.
    From a = 1 to a mean of 3 at server rate 0.5: 2. Without a step nothing changes.
    """
    algorithm = ScaffoldConfig().build(4)
    start = state(0.0, {"w": torch.ones(1)})
    params, extra, memory = descend(algorithm, task(start, algorithm, {"w": torch.tensor([3.0])}), target=4.0, steps=1)
    assert (params["w"].item(), extra["w"].item(), memory["w"].item()) == (3.0, -7.0, -4.0)
    after = step(algorithm, start, [result(0, 3.0, extra=extra), result(2, 1.0, extra={"w": torch.ones(1)})])
    assert (after.params["w"].item(), after.server["w"].item()) == (2.0, -0.5)
    slow = step(
        ScaffoldConfig(server_lr=0.5).build(1), state(1.0, {"w": torch.zeros(1)}), [result(0, 3.0, extra=memory)]
    )
    assert slow.params["w"].item() == 2.0
    extra, same = algorithm.local.finish({"w": torch.ones(1)}, {}, task(start, algorithm, memory), 0)
    assert (extra["w"].item(), same["w"].item()) == (0.0, -4.0)


def test_contrastive_by_hand():
    """cos(z, z_glob) = 1 and cos(z, z_prev) = 0 at temperature 0.5: -log(e^2 / (e^2 + 1)); equal ones give log 2."""
    current, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert contrastive(current, 3 * current, other, 0.5).item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert contrastive(current, other, other, 0.5).item() == pytest.approx(math.log(2))


def test_fedavgm_by_hand():
    """From w = 1 with m = 2 and beta = 0.5 to a mean of 4: m = 0.5 * 2 + 3 = 4, w = 1 + 4 = 5; at rate 0.5 w = 3."""
    start = state(1.0, {"w": torch.tensor([2.0])})
    after = step(FedAvgMConfig(beta=0.5).build(2), start, [result(0, 2.0), result(1, 6.0)])
    assert (after.params["w"].item(), after.server["w"].item()) == (5.0, 4.0)
    slow = step(FedAvgMConfig(beta=0.5, server_lr=0.5).build(2), start, [result(0, 4.0)])
    assert (slow.params["w"].item(), slow.server["w"].item()) == (3.0, 4.0)


def test_fedacg_by_hand():
    """theta = 1, m = 2, lambda = 0.5: clients got a = 2. Their mean is 5, so m = 0.5 * 2 + 3 = 4.

    theta = 1 + 4 = 5 is deployed, clients receive 5 + 0.5 * 4 = 7. Locally, with beta = 1, from a = 2 to target 6: as
    FedProx above, 4.
    """
    algorithm = FedACGConfig(momentum=0.5, beta=1).build(2)
    start = state(2.0, {"w": torch.tensor([2.0])})
    after = step(algorithm, start, [result(0, 4.0), result(1, 6.0)])
    assert (after.deployed["w"].item(), after.params["w"].item(), after.server["w"].item()) == (5.0, 7.0, 4.0)
    assert descend(algorithm, task(start, algorithm, {}), target=6.0, steps=2)[0]["w"].item() == 4.0


def test_fedvarp_by_hand():
    """N = 4, a = 1, mean of all h_k = 2. Client 0 goes to 4 (d = 3, h_0 = 1), client 1 to 2 (d = 1, h_1 = 5).

    w = 1 + ((3 - 1) + (1 - 5)) / 2 + 2 = 2;  h = 2 + ((3 - 1) + (1 - 5)) / 4 = 1.5. The client uploads the old h_k and
    keeps the new one.
    """
    algorithm = FedVARPConfig().build(4)
    start = state(1.0, {"w": torch.tensor([2.0])})
    extra, memory = algorithm.local.finish(
        {"w": torch.tensor([4.0])}, {}, task(start, algorithm, {"w": torch.ones(1)}), 1
    )
    assert (extra["w"].item(), memory["w"].item()) == (1.0, 3.0)
    after = step(algorithm, start, [result(0, 4.0, 9, extra), result(1, 2.0, 1, {"w": torch.tensor([5.0])})])
    assert (after.params["w"].item(), after.server["w"].item()) == (2.0, 1.5)


EVERY = [FedAvgConfig(), FedProxConfig(), FedDynConfig(), ScaffoldConfig(), MoonConfig(), FedAvgMConfig()]


@pytest.mark.parametrize("config", [*EVERY, FedACGConfig(), FedVARPConfig()])
def test_upload_like_is_zeros_in_the_form_of_what_finish_uploads(config):
    algorithm = config.build(2)
    now = state(1.0, algorithm.server.init({"w": torch.zeros(1)}))
    todo = task(now, algorithm, algorithm.local.init_memory(now.params, {}))
    extra, _ = algorithm.local.finish({"w": torch.ones(1)}, {}, todo, 1)
    like = algorithm.local.upload_like(now.params)
    assert like == {name: torch.zeros_like(tensor) for name, tensor in extra.items()}
