"""Whole runs of members who train and mix, put together from the product's pieces or from definitions.

A run takes two functions. `mix(round, thetas, phis)` gives every member its pseudo-gradient; `step(trained, theta,
state, gradient)` is its outer step. The product's own are fp32 where a run has fp32; push-sum and pairs also mix fp64.
"""

import numpy as np
import torch

from farflung.aggregation import pairs, push_sum
from farflung.aggregation.graphs import parse_graph, plan_round
from farflung.aggregation.outer import parse_outer
from farflung.aggregation.registry import parse_rule
from farflung.aggregation.rows import dense_rows
from farflung.aggregation.rule import Context

WIDE = pairs.Radius(1e9)
"""A radius that clips nothing."""


def gather(weights):
    """Everybody takes the weighted mean of everybody's Δ: the product's rule `mean`, in fp32."""
    rule, weight_n = parse_rule("mean").rule, torch.tensor(weights, dtype=torch.float64)

    def mix(round_index, thetas, phis):
        rows = dense_rows([theta_d - phi_d for theta_d, phi_d in zip(thetas, phis, strict=True)])
        update_d = rule(rows, weight_n, f=0, context=Context(round_index)).update_d
        return [update_d.clone() for _ in thetas]

    return mix


def by_push_sum(weights, spec="base(k=1)", ref_d=None, ticks=None):
    """Fresh-round push-sum over one period, or over `ticks`, in the type of the vectors."""

    def mix(round_index, thetas, phis):
        graph, n = parse_graph(spec), len(phis)
        plan = plan_round(graph, n, ticks or graph.period(n), run_id=b"run", round_index=round_index)
        reference_d = torch.zeros_like(phis[0]) if ref_d is None else ref_d.to(phis[0].dtype)
        rounds = [push_sum.begin(i, plan, phis[i], reference_d, [weights[i]]) for i in range(n)]
        push_sum.mix_all(rounds)
        return [member.finish(theta_d, reference_d) for member, theta_d in zip(rounds, thetas, strict=True)]

    return mix


def by_pairs(ticks=1, ref_d=None, radius=WIDE):
    """Seeded matchings among members of equal weight."""

    def mix(round_index, thetas, phis):
        n = len(phis)
        plan = plan_round(parse_graph("random-matching"), n, ticks, run_id=b"run", round_index=round_index)
        reference_d = torch.zeros_like(phis[0]) if ref_d is None else ref_d.to(phis[0].dtype)
        rounds = [pairs.begin(phi_d, reference_d, 1.0, radius) for phi_d in phis]
        pairs.mix_pairs(rounds, plan)
        return [member.finish(theta_d, reference_d) for member, theta_d in zip(rounds, thetas, strict=True)]

    return mix


def by_definition(weights):
    """θ_i − Σ m φ / Σ m in numpy, fp64."""

    def mix(round_index, thetas, phis):
        mean_d = np.average(np.stack([phi_d.double().numpy() for phi_d in phis]), axis=0, weights=weights)
        return [theta_d - torch.from_numpy(mean_d) for theta_d in thetas]

    return mix


def product_step(spec):
    """The product's outer optimiser, fp32, in place of nothing: θ and the state are new tensors."""
    outer = parse_outer(spec)

    def step(trained, theta_d, state, gradient_d):
        state = tuple(torch.zeros_like(theta_d) for _ in outer.state_names) if state is None else state
        out_d, kept = torch.empty_like(theta_d), tuple(torch.empty_like(part_d) for part_d in state)
        outer.step(theta_d, state, gradient_d, theta_out_d=out_d, state_out=kept, trained=trained)
        return out_d, kept

    return step


def defined_step(name, lr, momentum=0.0):
    """The papers' outer steps in the type of the vectors: "sgd", "heavy-ball", "nesterov"."""

    def step(trained, theta_d, buffer_d, gradient_d):
        buffer_d = gradient_d if buffer_d is None else momentum * buffer_d + gradient_d
        move_d = {"sgd": gradient_d, "heavy-ball": buffer_d, "nesterov": gradient_d + momentum * buffer_d}[name]
        return theta_d - lr * move_d, buffer_d

    return step


def run(mix, step, train, starts, rounds):
    """All members' θ after some rounds. `train(i, theta_d, round)` is member i's local phase."""
    thetas, states = [start_d.clone() for start_d in starts], [None] * len(starts)
    for round_index in range(rounds):
        phis = [train(i, theta_d.clone(), round_index) for i, theta_d in enumerate(thetas)]
        gradients = mix(round_index, thetas, phis)
        moved = [step(round_index + 1, *one) for one in zip(thetas, states, gradients, strict=True)]
        thetas, states = [theta_d for theta_d, _ in moved], [state for _, state in moved]
    return torch.stack(thetas)


def quadratics(seed, n, d=8, steps=5, lr=0.1):
    """n members whose losses are Σ a (x − c)² / 2 with curvatures and centres of their own; plain local descent."""
    generator = np.random.default_rng(seed)
    curve_nd = torch.from_numpy(np.exp(generator.standard_normal((n, d)) / 2))
    centre_nd = torch.from_numpy(generator.standard_normal((n, d)))

    def train(i, theta_d, round_index):
        curve_d, centre_d = curve_nd[i].to(theta_d.dtype), centre_nd[i].to(theta_d.dtype)
        for _ in range(steps):
            theta_d = theta_d - lr * curve_d * (theta_d - centre_d)
        return theta_d

    return train
