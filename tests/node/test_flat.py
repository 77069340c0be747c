"""A model is one fp32 vector in canonical order, and Δ contains training and nothing else."""

import pytest
import torch
from torch import nn

from farflung.aggregation.outer import norm
from farflung.node import flat
from farflung.protocol.errors import ConfigError, LocalError


class Tied(nn.Module):
    """Two names for one weight, a frozen tensor, a non-contiguous one, and buffers."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.z_head = nn.Linear(4, 6, bias=False)
        self.embed = nn.Embedding(6, 4)
        self.z_head.weight = self.embed.weight
        self.across = nn.Parameter(torch.empty(5, 3).t())
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)
        self.batch_norm = nn.BatchNorm1d(4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.to(dtype)


def flat_of(model: nn.Module) -> torch.Tensor:
    out_d = torch.full((flat.schema_of(model).numel,), torch.nan)
    flat.read_parameters(model, out_d)
    return out_d


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_reading_and_writing_is_a_round_trip_bit_for_bit(dtype):
    source, target = Tied(1, dtype), Tied(2, dtype)
    flat.write_parameters(target, flat_of(source))
    assert torch.equal(flat_of(source), flat_of(target))
    if dtype is not torch.float64:
        for name, parameter in source.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(parameter, dict(target.named_parameters())[name])


def test_a_tied_weight_is_exchanged_once_under_its_first_name_and_frozen_ones_never():
    schema = flat.schema_of(Tied())
    names = [tensor.name for tensor in schema.tensors]
    assert names == ["across", "batch_norm.bias", "batch_norm.weight", "embed.weight"]
    assert schema.numel == 15 + 4 + 4 + 24
    shared = nn.Module()
    shared.b = nn.Parameter(torch.ones(3))
    shared.a = nn.Parameter(shared.b.data)
    assert [tensor.name for tensor in flat.schema_of(shared).tensors] == ["a"]


def test_order_does_not_depend_on_registration_or_wrappers():
    forward, backward = nn.Module(), nn.Module()
    for name in "abc":
        forward.register_parameter(name, nn.Parameter(torch.full((2,), float(ord(name)))))
    for name in "cba":
        backward.register_parameter(name, nn.Parameter(torch.full((2,), float(ord(name)))))
    assert flat.schema_of(forward) == flat.schema_of(backward)
    assert torch.equal(flat_of(forward), flat_of(backward))
    wrapped = nn.Module()
    wrapped._orig_mod = forward
    assert flat.schema_of(wrapped) == flat.schema_of(forward)


def test_schema_differences_are_named():
    assert flat.schema_of(Tied()).explain_difference(flat.schema_of(Tied())) is None
    ours, theirs = flat.schema_of(Tied()), flat.schema_of(Tied(0, torch.bfloat16))
    assert "bfloat16" in (ours.explain_difference(theirs) or "")
    difference = flat.schema_of(nn.Linear(2, 3)).explain_difference(flat.schema_of(nn.Linear(2, 4)))
    assert difference is not None
    assert "bias" in difference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta_is_what_training_moved_without_the_rounding_of_adoption(dtype):
    model = Tied(0, dtype)
    theta_d = torch.randn(flat.schema_of(model).numel, generator=torch.Generator().manual_seed(3))
    start_d, delta_d = torch.empty_like(theta_d), torch.empty_like(theta_d)
    held_d = flat.adopt(model, theta_d, start_d)
    assert (held_d is theta_d) == (dtype is torch.float32)
    flat.difference_into(delta_d, held_d, model)
    assert not delta_d.any()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    flat.difference_into(delta_d, held_d, model)
    assert torch.equal(delta_d, held_d - flat_of(model))
    in_place_d = held_d.clone()
    flat.difference_into(in_place_d, in_place_d, model)
    assert torch.equal(in_place_d, delta_d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 70_000])
def test_the_passes_that_do_two_things_at_once_do_both(dtype, width):
    model = Tied(0, dtype)
    model.a_wide = nn.Parameter(torch.zeros(3, width, dtype=dtype))
    model.b_across = nn.Parameter(torch.zeros(width, 2, dtype=dtype).t())
    theta_d = torch.randn(flat.schema_of(model).numel, generator=torch.Generator().manual_seed(3))
    start_d, held_d = torch.full_like(theta_d, torch.nan), torch.full_like(theta_d, torch.nan)
    flat.adopt_copy(model, theta_d, start_d)
    assert torch.equal(flat_of(model), theta_d.to(dtype).float())
    assert torch.equal(start_d, flat.adopt(model, theta_d, held_d))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    wanted_d = start_d - flat_of(model)
    found = flat.difference_and_norm(start_d, model)
    assert torch.equal(start_d, wanted_d)
    assert found == norm(wanted_d)


def test_low_precision_adoption_needs_a_start_vector():
    with pytest.raises(LocalError, match="start vector"):
        flat.adopt(Tied(0, torch.bfloat16), torch.zeros(47))


@pytest.mark.parametrize("window", [7, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shifting_keeps_local_progress_and_moves_the_anchor(dtype, window, monkeypatch):
    monkeypatch.setattr(flat, "WINDOW", window)
    model = Tied(0, dtype)
    generator = torch.Generator().manual_seed(1)
    old_d, new_d = torch.randn(47, generator=generator), torch.randn(47, generator=generator)
    expected_d = (flat_of(model) - old_d + new_d).to(dtype).float()
    flat.shift_parameters(model, new_d, old_d)
    assert torch.equal(flat_of(model), expected_d)


def test_adoption_keeps_storages_and_the_optimiser_usable():
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    where = [parameter.data_ptr() for parameter in model.parameters()]

    def train() -> None:
        optimizer.zero_grad()
        sum(parameter.square().sum() for parameter in model.parameters() if parameter.requires_grad).backward()
        optimizer.step()

    train()
    theta_d = torch.ones(47)
    flat.adopt(model, theta_d)
    assert [parameter.data_ptr() for parameter in model.parameters()] == where
    assert len(optimizer.state) == 4
    train()
    assert (flat_of(model) != 1).all()
    assert torch.equal(theta_d, torch.ones(47))


def test_a_vector_of_the_wrong_kind_is_our_own_bug():
    for wrong in (torch.zeros(46), torch.zeros(47, dtype=torch.float64), torch.zeros(94)[::2]):
        with pytest.raises(LocalError, match="length 47"):
            flat.write_parameters(Tied(), wrong)


def test_what_cannot_be_exchanged_is_refused_by_name():
    model = nn.Module()
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ConfigError, match="phase"):
        flat.schema_of(model)
    empty = nn.Module()
    empty.nothing = nn.Parameter(torch.zeros(0, 3))
    with pytest.raises(ConfigError, match="nothing"):
        flat.schema_of(empty)


def test_master_copies_are_refused_and_honest_optimisers_are_not():
    model = Tied(0, torch.bfloat16)
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=0.1)
    flat.refuse_master_copies(optimizer, model)
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter]["exp_avg"] = torch.zeros(parameter.shape)
    flat.refuse_master_copies(optimizer, model)
    optimizer.state[model.embed.weight]["shadow"] = model.embed.weight.detach().float()
    with pytest.raises(ConfigError, match="shadow"):
        flat.refuse_master_copies(optimizer)
    optimizer.state[model.embed.weight]["shadow"].zero_()
    optimizer.state[model.embed.weight]["master_param"] = torch.zeros(6, 4)
    with pytest.raises(ConfigError, match="master_param"):
        flat.refuse_master_copies(optimizer)


def test_an_optimiser_of_other_tensors_than_the_models_is_refused():
    model = Tied(0, torch.bfloat16)
    copies = [part.detach().float().requires_grad_() for part in model.parameters()]
    with pytest.raises(ConfigError, match="not the model's"):
        flat.refuse_master_copies(torch.optim.SGD(copies, lr=0.1), model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.fp32_from_fp16_groups = [copies]
    with pytest.raises(ConfigError, match="fp32_from_fp16_groups"):
        flat.refuse_master_copies(optimizer, model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_the_gpu_is_the_same_vector(dtype):
    here, there = Tied(5, dtype), Tied(5, dtype).cuda()
    assert torch.equal(flat_of(here), flat_of(there))
    new_d, old_d = torch.randn(47).pin_memory(), torch.randn(47)
    for model in (here, there):
        flat.shift_parameters(model, new_d, old_d)
    assert torch.equal(flat_of(here), flat_of(there))
    flat.adopt(there, new_d, torch.empty(47))
    delta_d = torch.empty(47)
    flat.difference_into(delta_d, flat_of(there), there)
    assert not delta_d.any()
