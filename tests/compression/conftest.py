"""What every compression test needs: a schema of d parameters, and vectors that codecs tend to get wrong."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from farflung.protocol.schema import Schema, TensorSpec

SHAPES = ("gauss", "zeros", "minus zeros", "equal", "spike", "denormal", "ties", "cauchy", "huge", "patches", "faint")


def make_schema(d: int) -> Schema:
    return Schema((TensorSpec("w", (d,), "float32"),))


def make_model_schema() -> Schema:
    """Tensors of one to three dimensions, some with sides that nothing divides, and a scalar."""
    shapes = {"bias": (7,), "conv": (5, 3, 7), "embed": (256, 64), "head": (64, 192), "norm": (64,), "odd": (50, 31)}
    return Schema(tuple(TensorSpec(name, shape, "float32") for name, shape in sorted(shapes.items())))


def make_vector(shape: str, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(d, generator=generator)
    match shape:
        case "zeros":
            return torch.zeros(d)
        case "minus zeros":
            return torch.full((d,), -0.0)
        case "equal":
            return torch.full((d,), -0.3)
        case "spike":
            out = torch.zeros(d)
            out[d // 2] = -7.0
            return out
        case "denormal":
            return gauss * 1e-41
        case "ties":
            return torch.randint(-2, 3, (d,), generator=generator).float()
        case "cauchy":
            return (gauss / torch.randn(d, generator=generator)).clamp(-1e5, 1e5)
        case "huge":
            return gauss.clamp(-1, 1) * 1e6
        case "patches":
            return (
                gauss * 10.0 ** torch.randint(-30, 3, (d // 100 + 1,), generator=generator).repeat_interleave(100)[:d]
            )
        case "faint":  # few numbers, some of them below what a format can carry next to a large one
            return torch.where(torch.rand(d, generator=generator) < 0.01, gauss * 1e-44, 0).index_fill(
                0, torch.tensor([d - 1]), 3.0
            )
        case _:
            return gauss


@pytest.fixture
def schema_of() -> Callable[[int], Schema]:
    return make_schema


@pytest.fixture
def model_schema() -> Schema:
    return make_model_schema()


@pytest.fixture(params=["flat", "model"])
def schema(request: pytest.FixtureRequest) -> Schema:
    return make_schema(70_001) if request.param == "flat" else make_model_schema()


@pytest.fixture
def vector() -> Callable[..., Tensor]:
    return make_vector


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", SHAPES)
