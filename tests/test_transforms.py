"""Every differentiable op has one derivative, in reverse mode: the right one, and one sentence for all others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ebft_kernels import (
    StridedLayout,
    linear_log_probs,
    mean_embedding_loss,
    pool_features,
    strided_attention,
)
from ebft_kernels.testing import randn

from .op_checks import impls_here

LAYOUT = StridedLayout.strided(1, 10, context=3, stride=3, horizon=2, samples=2)
TARGETS = torch.arange(6) % 5


def attention(x: Tensor, impl: str) -> Tensor:
    q = x.reshape(1, 1, -1, 4)
    return strided_attention(q, q.sin(), q.cos(), LAYOUT, sinks=x.reshape(-1)[:1], impl=impl)


def pooled(x: Tensor, impl: str) -> Tensor:
    return torch.cat([y.flatten() for y in pool_features([x.reshape(1, -1, 4)], LAYOUT, impl=impl)])


def mean_embedding(x: Tensor, impl: str) -> Tensor:
    x = x.reshape(1, LAYOUT.packed_length, 4)
    return mean_embedding_loss(x[:, :8].view(1, 2, 4, 4), x[:, 8:10], impl=impl)


def log_probs(x: Tensor, impl: str) -> Tensor:
    x = x.reshape(-1, 4)
    return linear_log_probs(x[:6], x[6:11], TARGETS, bias=x[:5, 0], impl=impl)


OPS = {
    "strided_attention": attention,
    "pool_features": pooled,
    "mean_embedding_loss": mean_embedding,
    "linear_log_probs": log_probs,
}
CASES = [(op, impl) for op in OPS for impl in impls_here(op)]
FUSED = [(op, impl) for op, impl in CASES if impl != "reference"]
ROUNDING = 1000 * torch.finfo(torch.float64).eps
X = randn(LAYOUT.packed_length * 4, seed=0, dtype=torch.float64)


def loss_of(op: str, impl: str):
    return lambda x: OPS[op](x, impl).exp().sum()


def dual(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(X, torch.ones_like(X)))).tangent


FORWARD = {
    "jvp": lambda f: torch.func.jvp(f, (X,), (torch.ones_like(X),)),
    "jvp of what requires a gradient": lambda f: torch.func.jvp(
        f, (X.clone().requires_grad_(),), (torch.ones_like(X),)
    ),
    "jacfwd": lambda f: torch.func.jacfwd(lambda t: f(t * X))(X[:1]),
    "hessian": lambda f: torch.func.hessian(lambda t: f(t * X))(X[:1]),
    "dual numbers": dual,
    "dual numbers in compiled code": lambda f: dual(torch.compile(f, backend="eager")),
    "vmap of jvp": lambda f: torch.vmap(lambda x: torch.func.jvp(f, (x,), (x,)))(X.expand(2, -1)),
    "jvp of vmap": lambda f: torch.func.jvp(torch.vmap(f), (X.expand(2, -1),), (X.expand(2, -1),)),
    "compiled jvp": lambda f: torch.compile(lambda x: torch.func.jvp(f, (x,), (x,)), backend="eager")(X),
}
REVERSE = {
    "grad": lambda f: torch.func.grad(f)(X),
    "vjp": lambda f: torch.func.vjp(f, X)[1](torch.ones((), dtype=X.dtype)),
    "jacrev": lambda f: torch.func.jacrev(f)(X),
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(f))(X.expand(2, -1)),
    "grad of vmap": lambda f: torch.func.grad(lambda x: torch.vmap(f)(x).sum())(X.expand(2, -1)),
    "compiled grad": lambda f: torch.compile(torch.func.grad(f), backend="eager")(X),
}


@pytest.fixture(autouse=True)
def _compiled_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("how", FORWARD)
@pytest.mark.parametrize(("op", "impl"), FUSED)
def test_forward_mode_is_refused(op, impl, how):
    with pytest.raises(Exception, match=f"{op}: it has no forward-mode derivative .* use reverse mode"):
        FORWARD[how](loss_of(op, impl))


@pytest.mark.parametrize("how", REVERSE)
@pytest.mark.parametrize(("op", "impl"), FUSED)
def test_reverse_mode_of_torch_func_is_refused(op, impl, how):
    with pytest.raises(
        Exception, match=f"{op}: torch.func.grad, vjp and jacrev cannot differentiate it; use torch.auto"
    ):
        REVERSE[how](loss_of(op, impl))


@pytest.mark.parametrize(("op", "impl"), FUSED)
def test_second_derivatives_are_refused(op, impl):
    f, x = loss_of(op, impl), X.clone().requires_grad_()
    for loss in (f(x), torch.vmap(f)(torch.stack([x, x])).sum()):
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(
            NotImplementedError, match=f"{op}: it is once differentiable, its gradient has no derivative"
        ):
            torch.autograd.grad(grad.square().sum(), x)


@pytest.mark.parametrize(("op", "impl"), FUSED)
def test_second_derivatives_of_compiled_code_are_refused(op, impl):
    """By the compiler, whose gradients have no derivatives, in sentences of its own."""
    x = X.clone().requires_grad_()
    loss = torch.compile(loss_of(op, impl), backend="aot_eager")(x)
    with pytest.raises(RuntimeError, match="double backward|not have been used in the graph"):
        torch.autograd.grad(torch.autograd.grad(loss, x, create_graph=True)[0].square().sum(), x)


@pytest.mark.parametrize("op", OPS)
def test_the_reference_has_every_derivative(op):
    f = loss_of(op, "reference")
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    jvp, tangent = torch.func.jvp(f, (X,), (X,))[1], float(first.detach() @ X)
    # Sums of some 100 terms in another order, and in the second derivatives sums of such.
    assert abs(jvp - tangent) <= ROUNDING * (first.abs() @ X.abs())
    assert (torch.func.grad(f)(X) - first).abs().max() <= ROUNDING * first.abs().max()
    twice = torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())(X)
    assert second.abs().max() > 0 and (twice - second).abs().max() <= ROUNDING * second.abs().max()


@pytest.mark.parametrize(("op", "impl"), CASES)
def test_transforms_that_differentiate_something_else_are_no_obstacle(op, impl):
    """vmap, and an op whose inputs do not depend on what is differentiated."""
    f = loss_of(op, impl)
    rows = torch.stack([X, 2 * X])
    one, values = torch.ones((), dtype=X.dtype), torch.stack([f(row) for row in rows])
    for actual in (
        torch.vmap(f)(rows),
        torch.func.jvp(lambda t: t * torch.vmap(f)(rows), (one,), (one,))[1],
        torch.func.jacrev(lambda t: t * torch.vmap(f)(rows))(one),
    ):
        assert ((actual - values).abs() <= ROUNDING * values.abs()).all()
    assert torch.equal(torch.func.grad(lambda t: t * f(X))(one), f(X))
