"""The kernels on a real GPU: right in every variant, deterministic, under autocast and compiled."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config
from torch import Tensor

from swiftkernels import AdditiveAttention
from swiftkernels.testing.tolerance import budget, relative_error
from swiftkernels.tools import verify
from swiftkernels.tools.verify import DTYPES
from tests.gpu.layers import make_layer, random_images, train

dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.parametrize("backend", ["triton", "aten"])
@dtypes
@pytest.mark.parametrize("case", verify.CASES, ids=str)
def test_every_case_is_as_right_as_eager(gpu, backend, dtype, case):
    result = verify.verify_case(case, backend, dtype, gpu)
    assert not result.failure, result.failure


@dtypes
@pytest.mark.parametrize("width", [48, 112, 320])
def test_the_same_input_gives_the_same_bits(gpu, dtype, width):
    layer = make_layer(width, dtype, gpu)
    x = random_images(width, dtype, gpu)
    for first, again in zip(train(layer, x), train(layer, x), strict=True):
        assert torch.equal(first, again)


@dtypes
def test_a_batch_element_does_not_depend_on_the_others(gpu, dtype):
    layer = make_layer(48, dtype, gpu)
    x = random_images(48, dtype, gpu)
    with torch.no_grad():
        assert torch.equal(layer(x)[1:2], layer(x[1:2]))


@dtypes
@pytest.mark.parametrize("width", [48, 112])
def test_compiled_it_is_what_it_is_in_eager_mode(gpu, dtype, width):
    layer = make_layer(width, dtype, gpu)
    x = random_images(width, dtype, gpu)
    with torch._inductor.config.patch(force_disable_caches=True):
        found = train(torch.compile(layer, fullgraph=True), x)
    for ours, eager in zip(found, train(layer, x), strict=True):
        assert ours.dtype == eager.dtype
        assert relative_error(ours, eager) <= budget(0.0, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_under_autocast_it_computes_in_the_autocast_type(gpu, dtype):
    layer = make_layer(48, torch.float32, gpu)
    x = random_images(48, torch.float32, gpu)

    def run() -> list[Tensor]:
        with torch.autocast(gpu.type, dtype):
            return train(layer, x)

    ours = run()
    layer.backend = "reference"
    eager, exact = run(), train(layer.double(), x.double())
    assert ours[0].dtype == dtype
    assert all(grad.dtype == torch.float32 for grad in ours[1:])
    for our, theirs, right in zip(ours, eager, exact, strict=True):
        assert relative_error(our, right) <= budget(relative_error(theirs, right), dtype)


def test_training_with_a_gradient_scaler_goes_on(cuda):
    layer = make_layer(48, torch.float32, cuda)
    x = random_images(48, torch.float32, cuda)
    scaler = torch.amp.GradScaler(cuda.type)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast(cuda.type, torch.float16):
            loss = (layer(x) - x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# A softmax over equal blocks of tokens weighs each block alike: G, the outputs and the gradients
# of the tokens are those of a single block, however many there are.
ELEMENTS = 1 << 31
BLOCK = 1 << 10
WIDTH = 64


@pytest.mark.parametrize("long", [True, False], ids=["one long", "many"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_more_elements_than_an_int32_can_count(cuda, long, backward):
    copies = ELEMENTS // (BLOCK * WIDTH) + 3
    needed = (5 if backward else 3) * copies * BLOCK * WIDTH * 2  # bytes, with some to spare
    free, _ = torch.cuda.mem_get_info(cuda)
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory, there are {free / 2**30:.0f}")
    layer = make_layer(WIDTH, torch.float16, cuda, pooling="softmax").requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    block, dout = (
        torch.randn(1, BLOCK, WIDTH, generator=generator).to(cuda, torch.float16) for _ in range(2)
    )
    shape = (1, copies, 1) if long else (copies, 1, 1)

    def run(x: Tensor, dout: Tensor) -> Tensor:
        """The output, or the gradient of x."""
        x.requires_grad_(backward)
        out = layer(x)
        return torch.autograd.grad(out, x, dout)[0] if backward else out

    expected = run(block.clone(), dout)
    found = run(block.repeat(shape), dout.repeat(shape)).view(copies, BLOCK, WIDTH)
    worst = max(relative_error(part, expected) for part in found.split(1))
    assert worst <= budget(0.0, torch.float16, ulps=8)


def test_wide_layers_say_what_they_cannot_do(gpu):
    layer = AdditiveAttention(1032, 1032, 1, backend="triton", device=gpu, dtype=torch.float16)
    with pytest.raises(ValueError, match="up to 1024"):
        layer(torch.zeros(1, 4, 1032, device=gpu, dtype=torch.float16))
