"""Your own training loop, with a swarm around it. Any loop will do: farflung only counts its steps.

    farflung new own_task.toml                    # in examples/; prints an invite
    python plain_loop.py farflung1... --home HOME # the founder: with the home that `farflung new` was given
    python plain_loop.py farflung1...             # on another machine, or here with another --home

What `swarm.step()` does: it counts. After the run's `inner_steps` it sends what this member has learned since the last
round, waits for the others' (seconds, never for ever), and puts the agreed parameters into the model. Your optimiser
keeps its state.
"""

from __future__ import annotations

import argparse

import torch
from own_task import Thirds, _points  # stands for your own model and data
from torch.utils.data import TensorDataset

import farflung


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("invite")
    arguments.add_argument("--home", default=None, help="where identity and checkpoints are kept")
    chosen = arguments.parse_args()

    task = Thirds()
    model = task.build_model()  # the tensors must be those the run was created with; their values do not matter
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    with farflung.join(chosen.invite, model, optimizer, home=chosen.home) as swarm:  # leaves politely, also on Ctrl-C
        for inputs, labels in swarm.shard(TensorDataset(*_points(4096, seed=0)), batch=32):  # ends with the run
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            swarm.step(tokens=len(labels), loss=loss.detach())
    print(f"loss on new points: {task.evaluate(model):.3f}")


if __name__ == "__main__":
    main()
