"""What a swarm must equal: one member, plain training, data-parallel SGD, the minimum-norm solution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_world import Player, SmallWorld
from torch import nn

from farflung.protocol.genesis import Timing

pytestmark = pytest.mark.usefixtures("quick_peers")

PATIENT = Timing(
    grace_ms=60_000, deadline_floor_ms=60_000, deadline_ceiling_ms=60_000, view_floor_ms=10_000, resend_ms=200
)
"""Nobody is hurried or left out: what is compared is the arithmetic."""


def make_mlp() -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def batch_of(seed: int, count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_nd = torch.randn(count, 6, generator=generator)
    return x_nd, torch.stack([x_nd[:, 0] * x_nd[:, 1], x_nd[:, 2].sin(), x_nd[:, 3:].sum(1)], 1)


def flat(model: nn.Module) -> torch.Tensor:
    """By name, as the swarm orders them."""
    return torch.cat([value.detach().reshape(-1) for _, value in sorted(model.named_parameters())])


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    x_nd, y_n3 = batch_of(seed)
    dtype = next(model.parameters()).dtype
    return (model(x_nd.to(dtype)) - y_n3.to(dtype)).pow(2).mean()


def momentum_step(seed_of):
    """Inner SGD with momentum: its state is the member's own and is kept across rounds."""
    optimizers: dict[int, torch.optim.Optimizer] = {}

    def step(player: Player) -> float:
        if player.index not in optimizers:
            optimizers[player.index] = torch.optim.SGD(player.model.parameters(), lr=0.05, momentum=0.9)
        loss = loss_of(player.model, seed_of(player))
        loss.backward()
        optimizers[player.index].step()
        optimizers[player.index].zero_grad()
        return float(loss.detach())

    return step


def plain_step(seed_of, lr: float = 0.05):
    def step(player: Player) -> float:
        loss = loss_of(player.model, seed_of(player))
        for parameter in player.model.parameters():
            parameter.grad = None
        loss.backward()
        with torch.no_grad():
            for parameter in player.model.parameters():
                parameter.sub_(lr * parameter.grad)
        return float(loss.detach())

    return step


def run(root, members: int, phases: int, step, **settings) -> list[torch.Tensor]:
    """Every member's anchors, from θ₀ on; asserts that they are the same bits on all."""
    defaults = {"timing": PATIENT, "quorum_percent": 100, "start_members": members}
    with SmallWorld(root, make_mlp, **defaults | settings) as world:
        players = [world.play(index, step, phases=phases) for index in range(members)]
        for player in players:
            player.rest()
        for player in players[1:]:
            assert torch.equal(player.held(), players[0].held())
            assert player.adopted.keys() == players[0].adopted.keys()
        for index in range(members):
            assert all(len(entry["payloads"]) == members for entry in world.trained(index))
        return list(players[0].held())


def within_ulps(ours: torch.Tensor, reference: torch.Tensor, ulps: float) -> bool:
    """Compared in units in the last place of the largest |θ|."""
    unit = float(np.spacing(np.float32(reference.abs().max())))
    off = float((ours.double() - reference.double()).abs().max()) / unit
    assert off <= ulps, f"{off:.1f} ulps apart"
    return True


@pytest.mark.parametrize("outer", ["sgd(lr=1.0)", "nesterov(lr=0.7,momentum=0.9)"])
def test_identical_members_are_one_member_bit_for_bit(tmp_path, outer):
    def seed_of(player: Player) -> int:
        return player.steps_taken

    three = run(tmp_path / "three", 3, 5, momentum_step(seed_of), outer=outer, inner_steps=3)
    one = run(tmp_path / "one", 1, 5, momentum_step(seed_of), outer=outer, inner_steps=3)
    assert len(three) == len(one) == 6
    assert not torch.equal(one[0], one[-1])
    for ours_d, theirs_d in zip(three, one, strict=True):
        assert torch.equal(ours_d, theirs_d)


@pytest.mark.parametrize("outer", ["sgd(lr=0.0)", "nesterov(lr=0.0,momentum=0.9)"])
def test_an_outer_learning_rate_of_zero_keeps_the_anchor(tmp_path, outer):
    anchors = run(tmp_path, 2, 6, plain_step(lambda player: player.index), outer=outer, snapshot_rounds=2)
    assert all(torch.equal(theta_d, flat(make_mlp())) for theta_d in anchors)


def test_one_local_step_and_plain_averaging_is_data_parallel_sgd(tmp_path):
    members, rounds, lr = 3, 24, 0.1

    def seed_of(player: Player) -> int:
        return 100 * player.steps_taken + player.index

    anchors = run(tmp_path, members, rounds, plain_step(seed_of, lr), outer="sgd(lr=1.0)", inner_steps=1)
    reference = make_mlp().double()
    for round_index in range(rounds + 1):
        assert within_ulps(anchors[round_index], flat(reference), 8.0)
        reference.zero_grad()
        for member in range(members):
            (loss_of(reference, 100 * (round_index + 1) + member) / members).backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.sub_(lr * parameter.grad)
    assert not within_a_percent(anchors[0], anchors[-1])


def within_a_percent(first_d: torch.Tensor, last_d: torch.Tensor) -> bool:
    return float((first_d - last_d).norm() / first_d.norm()) < 0.01


@pytest.mark.parametrize(("lr", "momentum"), [(1.0, 0.0), (0.7, 0.9)])
def test_one_member_is_plain_training_with_the_outer_step_by_hand(tmp_path, lr, momentum):
    rounds, steps = 6, 4
    outer = f"nesterov(lr={lr},momentum={momentum})" if momentum else f"sgd(lr={lr})"
    step = momentum_step(lambda player: player.steps_taken)
    anchors = run(tmp_path, 1, rounds, step, outer=outer, inner_steps=steps)
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    named = sorted(model.named_parameters())
    theta = flat(model).numpy()
    buffer = np.zeros_like(theta)
    for round_index in range(rounds):
        assert within_ulps(anchors[round_index], torch.from_numpy(theta), 2.0)
        for local in range(steps):
            loss_of(model, round_index * steps + local + 1).backward()
            optimizer.step()
            optimizer.zero_grad()
        delta = theta - flat(model).numpy()
        buffer = (momentum * buffer.astype(np.float64) + delta).astype(np.float32)
        theta = (theta - lr * (delta + momentum * buffer.astype(np.float64))).astype(np.float32)
        with torch.no_grad():
            start = 0
            for _, parameter in named:
                parameter.copy_(torch.from_numpy(theta[start : start + parameter.numel()]).view(parameter.shape))
                start += parameter.numel()
    assert within_ulps(anchors[-1], torch.from_numpy(theta), 2.0)


def test_members_with_different_rows_find_the_minimum_norm_solution(tmp_path):
    members, samples, features = 3, 12, 24
    generator = np.random.default_rng(5)
    x_nd = np.linalg.qr(generator.standard_normal((features, samples)))[0].T + 0.1 * generator.standard_normal(
        (samples, features)
    )
    y_n = generator.standard_normal(samples)
    x, y = torch.from_numpy(x_nd).float(), torch.from_numpy(y_n).float()

    def make() -> nn.Module:
        model = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def step(player: Player) -> None:
        rows = slice(4 * player.index, 4 * player.index + 4)
        weight = player.model.weight
        with torch.no_grad():
            weight -= 0.5 * (x[rows].T @ (x[rows] @ weight[0] - y[rows]))

    settings = {"timing": PATIENT, "quorum_percent": 100, "start_members": members, "inner_steps": 20}
    with SmallWorld(tmp_path, make, outer="sgd(lr=2.0)", **settings) as world:
        players = [world.play(index, step, phases=30) for index in range(members)]
        for player in players:
            player.rest()
        found = players[0].held()[-1].double().numpy()
    wanted = np.linalg.pinv(x_nd) @ y_n
    assert np.linalg.norm(x_nd @ found - y_n) < 1e-5 * np.linalg.norm(y_n)
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)
