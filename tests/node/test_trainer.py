"""The local loop counts what moved, follows the certified step, and continues bit for bit after a restart."""

import json
from itertools import islice

import pytest
import torch
from torch import nn

from farflung.node.data import solo_view
from farflung.node.flat import read_parameters, schema_of
from farflung.node.optimizer_state import optimizer_tensors, restore_optimizer
from farflung.node.tasks import load_task
from farflung.node.trainer import Trainer, TrainerSettings, pick_device
from farflung.protocol.canonical import encode_canonical
from farflung.protocol.errors import ConfigError, LocalError


def flat_of(model: nn.Module) -> torch.Tensor:
    out_d = torch.empty(schema_of(model).numel)
    read_parameters(model, out_d)
    return out_d


def make_model(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def batches(size: int = 4, *, skip: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(1)
    endless = iter(lambda: torch.randn(size, 8, generator=generator).to(dtype), None)
    return islice(endless, skip, None)


def square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - 1).square().mean()


def test_the_gpt_learns_in_thirty_steps():
    options = {"layers": 2, "width": 32, "context": 32, "batch": 8, "lr": 6e-3, "warmup": 5, "validation_windows": 16}
    task = load_task("builtin:stdlib-gpt", options)
    trainer = Trainer.of_task(task, solo_view(), TrainerSettings(device="cpu", seed=0, clip_norm=1.0))
    before = task.evaluate(trainer.model)
    results = [trainer.train_step() for _ in range(30)]
    assert all(result.counted and result.tokens == 8 * 32 for result in results)
    assert trainer.global_step == 30
    assert task.evaluate(trainer.model) < before - 1.5
    assert float(results[-1].loss) < before - 1.5


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_accumulating_k_batches_is_one_large_batch(clip_norm):
    small, large = make_model(), make_model()
    settings = TrainerSettings(accumulate=4, clip_norm=clip_norm)
    accumulating = Trainer(small, torch.optim.SGD(small.parameters(), 0.1), square, batches(4), settings=settings)
    settings = TrainerSettings(clip_norm=clip_norm)
    whole = (torch.cat(group) for group in zip(*[batches(4)] * 4, strict=True))
    plain = Trainer(large, torch.optim.SGD(large.parameters(), 0.1), square, whole, settings=settings)
    for _ in range(3):
        first, second = accumulating.train_step(), plain.train_step()
        assert first.tokens == second.tokens == 16 * 8
        torch.testing.assert_close(first.loss, second.loss)
    assert accumulating.global_step == 3
    torch.testing.assert_close(flat_of(small), flat_of(large))


def test_clipping_bounds_the_update():
    model = make_model()
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), 1.0), square, batches(), settings=TrainerSettings(clip_norm=0.01)
    )
    before_d = flat_of(model)
    trainer.train_step()
    assert float((flat_of(model) - before_d).norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("rate", [0.5, torch.tensor(0.5)])
def test_the_learning_rate_follows_the_certified_step_and_rewarming_is_a_ramp_on_it(rate):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    trainer = Trainer(model, optimizer, square, batches(), lr_at=lambda step: 1 / (1 + step))

    def rate_of_next_step() -> float:
        trainer.train_step()
        return float(optimizer.param_groups[0]["lr"])

    assert [rate_of_next_step() for _ in range(2)] == [0.5, 0.25]
    trainer.global_step = 9
    assert rate_of_next_step() == pytest.approx(0.05)
    trainer.global_step = 0
    trainer.start_fresh(rewarm_steps=2)
    assert not optimizer.state
    assert [rate_of_next_step() for _ in range(3)] == pytest.approx([0.25, 0.25, 0.5 / 3])


def test_without_a_schedule_the_users_own_learning_rate_is_left_alone():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = Trainer(model, optimizer, square, batches())
    optimizer.param_groups[0]["lr"] = 0.03
    trainer.train_step()
    assert optimizer.param_groups[0]["lr"] == 0.03


@pytest.mark.parametrize(
    "make",
    [
        lambda parts: torch.optim.AdamW(parts, lr=0.01, amsgrad=True),
        lambda parts: torch.optim.AdamW(parts, lr=torch.tensor(0.01)),
        lambda parts: torch.optim.SGD(parts, lr=0.01, momentum=0.9, nesterov=True),
        lambda parts: torch.optim.Adagrad(parts, lr=0.01),
        lambda parts: torch.optim.RMSprop([{"params": parts[:2], "lr": 0.02}, {"params": parts[2:]}], lr=0.01),
        lambda parts: torch.optim.Adafactor(parts, lr=0.01),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_trainer_continues_bit_for_bit(make, dtype):
    def make_trainer(skip: int) -> Trainer:
        model = make_model(0.5, dtype)
        data = batches(skip=skip, dtype=dtype)
        settings = TrainerSettings(seed=7)
        return Trainer(
            model, make(list(model.parameters())), square, data, settings=settings, lr_at=lambda step: 1 / (1 + step)
        )

    first = make_trainer(0)
    first.rewarm(8)
    for _ in range(5):
        first.train_step()
    tensors, value = first.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    value = json.loads(encode_canonical(value))
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors.values())
    second = make_trainer(5)
    second.model.load_state_dict(first.model.state_dict())
    second.restore(tensors, value)
    for _ in range(5):
        assert torch.equal(first.train_step().loss, second.train_step().loss)
    assert torch.equal(flat_of(first.model), flat_of(second.model))
    assert first.global_step == second.global_step == 10


def test_optimiser_state_in_another_dtype_than_its_parameter_is_kept_exactly():
    model = make_model(dtype=torch.bfloat16)
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for _ in range(2))
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.rand(parameter.shape)
    restore_optimizer(other, *optimizer_tensors(optimizer))
    for parameter in model.parameters():
        ours, theirs = (side.state[parameter]["momentum_buffer"] for side in (optimizer, other))
        assert ours.dtype == theirs.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_the_state_of_another_optimiser_is_refused_with_the_difference():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    square(model, next(batches())).backward()
    optimizer.step()
    tensors, value = optimizer_tensors(optimizer)
    with pytest.raises(LocalError, match="SGD"):
        restore_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), tensors, value)
    with pytest.raises(LocalError, match="parameter 0"):
        restore_optimizer(torch.optim.AdamW(nn.Linear(3, 3).parameters()), tensors, value)
    with pytest.raises(LocalError, match="not the state"):
        restore_optimizer(torch.optim.AdamW(list(model.parameters())[:1]), tensors, value)
    name = next(iter(tensors))
    with pytest.raises(LocalError, match=name):
        restore_optimizer(optimizer, {key: part for key, part in tensors.items() if key != name}, value)
    with pytest.raises(LocalError, match="expected"):
        restore_optimizer(optimizer, {**tensors, name: torch.zeros(99)}, value)


def test_state_that_is_not_plain_data_is_never_pickled():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[next(model.parameters())]["odd"] = object()
    with pytest.raises(LocalError, match="object"):
        optimizer_tensors(optimizer)


def test_dropout_follows_the_members_seed_and_leaves_the_global_generator_alone():
    def draws(seed: int, ambient: int) -> tuple[list[float], list[float]]:
        model = make_model(0.5)
        settings = TrainerSettings(seed=seed)
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), square, batches(), settings=settings)
        torch.manual_seed(ambient)
        pairs = [(float(trainer.train_step().loss), float(torch.rand(()))) for _ in range(4)]
        return [loss for loss, _ in pairs], [draw for _, draw in pairs]

    torch.manual_seed(5)
    untouched = [float(torch.rand(())) for _ in range(4)]
    losses, ambient = draws(1, 5)
    assert ambient == untouched
    assert losses == draws(1, 6)[0] != draws(2, 5)[0]


def test_bf16_autocast_on_the_cpu_trains_and_keeps_fp32_parameters():
    model = make_model()
    settings = TrainerSettings(device="cpu", precision="bf16")
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), square, batches(64), settings=settings)
    losses = [float(trainer.train_step().loss) for _ in range(40)]
    assert losses[-1] < losses[0] / 2
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_step_that_loss_scaling_skipped_is_not_counted():
    model = make_model()
    explode = [False]

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return square(model, batch) * (torch.inf if explode[0] else 1)

    settings = TrainerSettings(precision="fp16", clip_norm=1.0)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), loss, batches(), settings=settings)
    while not trainer.train_step().counted:
        assert trainer.global_step == 0, "the first scales may be too large"
    before_d, explode[0] = flat_of(model), True
    assert not trainer.train_step().counted
    assert trainer.global_step == 1
    assert torch.equal(before_d, flat_of(model))
    explode[0] = False
    assert trainer.train_step().counted
    other = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), loss, batches(), settings=settings)
    other.restore(*trainer.state())
    assert other.state()[1] == trainer.state()[1]


def test_the_end_of_the_data_ends_training_and_leaves_the_generator_alone():
    model = make_model()
    settings = TrainerSettings(seed=3, accumulate=2)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), square, islice(batches(), 3), settings=settings)
    trainer.train_step()
    before = torch.get_rng_state()
    with pytest.raises(StopIteration):
        trainer.train_step()
    assert torch.equal(before, torch.get_rng_state())


def test_settings_that_cannot_work_are_refused():
    for wrong in ({"precision": "int8"}, {"accumulate": 0}, {"threads": 0}, {"clip_norm": 0.0}):
        with pytest.raises(ConfigError):
            TrainerSettings(**wrong)
    for device in ("abacus", "cuda:99"):
        with pytest.raises(ConfigError):
            pick_device(device)
    model = make_model()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), lambda model, batch: 1.0, batches())
    with pytest.raises(ConfigError, match="scalar"):
        trainer.train_step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_gpt_learns_on_the_gpu_and_continues_bit_for_bit(precision):
    options = {"layers": 2, "width": 64, "context": 64, "batch": 8, "lr": 4e-3, "warmup": 5}
    task = load_task("builtin:stdlib-gpt", options)
    settings = TrainerSettings(device="cuda", precision=precision, seed=0, clip_norm=1.0)
    trainer = Trainer.of_task(task, solo_view(), settings)
    losses = [float(trainer.train_step().loss) for _ in range(30)]
    assert losses[-1] < losses[0] - 1
    other = Trainer.of_task(task, solo_view(), settings)
    other.model.load_state_dict(trainer.model.state_dict())
    tensors, value = trainer.state()
    other.restore({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(value)))
    other.batches = trainer.batches = iter([next(trainer.batches)] * 2)
    assert torch.equal(trainer.train_step().loss, other.train_step().loss)
