"""`farflung.join`: from an invite, a model and an optimiser to a swarm."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import torch
from torch import nn

from farflung.node.data import RoundView
from farflung.node.flat import refuse_master_copies
from farflung.node.mailbox import Mailbox
from farflung.node.member import Member
from farflung.node.opening import JoinSettings, open_node
from farflung.node.saved import default_home
from farflung.node.shell import Node
from farflung.node.store import RunStore, open_home
from farflung.node.swarm import Swarm
from farflung.protocol.genesis import Genesis
from farflung.protocol.invite import Invite, parse_invite


def start_member(
    invite: Invite,
    model_of: Callable[[Genesis], nn.Module],
    settings: JoinSettings,
    on_store: Callable[[RunStore], None] = lambda store: None,
) -> Member:
    """Start a node in its thread. `model_of` builds (or returns) the model once genesis is known, in that thread.

    Raises ConfigError or TooFewPeers, in words for the user.
    """
    home = open_home(settings.home)

    async def opening(stack: AsyncExitStack, mailbox: Mailbox) -> Node:
        store = stack.enter_context(home.run(invite.run_id))
        on_store(store)
        return await open_node(
            stack, mailbox, home=home, store=store, invite=invite, model_of=model_of, settings=settings
        )

    return Member(opening)


def join(
    invite: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    home: str | Path | None = None,
    name: str = "",
    listen: str = "0.0.0.0:0",
    announce: tuple[str, ...] = (),
    upload_mbit: float | None = None,
    discovery: str = "both",
    on_adopt: Callable[[RoundView], None] | None = None,
) -> Swarm:
    """Join a run, and return when its anchor is in `model` and training may begin. With the same `home`, resume it.

    The model must have the tensors the run was created with. `on_adopt(view)` is called, in the training thread,
    whenever the model has been given a new anchor. Raises ConfigError if something must be changed first (a wrong
    invite, another model, a port in use), TooFewPeers if nobody of the run can be reached.
    """
    refuse_master_copies(optimizer, model)
    settings = JoinSettings(
        home=Path(home) if home is not None else default_home(),
        name=name,
        listen=listen,
        announce=announce,
        upload_mbit=upload_mbit,
        discovery=discovery,
    )
    return Swarm(start_member(parse_invite(invite), lambda genesis: model, settings), model, on_adopt)
