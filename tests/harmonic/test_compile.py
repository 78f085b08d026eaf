"""torch.compile, torch.export and ONNX."""

import pytest
import torch
import torch._dynamo.testing
from head_cases import C, N, V

from harmonic import (
    HEADS,
    IGNORE_INDEX,
    HarmonicHead,
    contributions,
    harmonic_loss,
)

# The first head of each kernel, map and denominator. The others differ in options: slow tests.
ALIKE = [(head.kernel, head.map, head.denominator is None) for head in HEADS.values()]
ONE_OF_EACH = [
    pytest.param(
        name, marks=[] if ALIKE.index(ALIKE[i]) == i or name == "cosine" else pytest.mark.slow
    )
    for i, name in enumerate(HEADS)
]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_head_is_exported(name):
    """torch.export with any number of states; pairs that cancel are in it."""
    torch.manual_seed(0)
    head = HarmonicHead(C, 128, name, real_vocab_size=V).eval()
    any_number = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        head, (torch.randn(2, 3, C),), dynamic_shapes=({0: any_number, 1: any_number},)
    )
    h = torch.randn(5, 7, C)
    h[0, 0], h[0, 1], h[0, 2] = head.weight[3], 1.001 * head.weight[5], 0
    torch.testing.assert_close(program.module()(h), head(h), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_onnxruntime_computes_an_exported_head(name):
    import onnxruntime

    torch.manual_seed(0)
    head = HarmonicHead(C, V, name).eval()
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    model = torch.onnx.export(
        head, (torch.randn(4, C),), dynamo=True, dynamic_shapes=shapes, verbose=False
    ).model_proto
    session = onnxruntime.InferenceSession(model.SerializeToString())
    h = torch.randn(9, C)
    (found,) = session.run(None, {session.get_inputs()[0].name: h.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), head(h), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "reduction"),
    [*(pytest.param(*p.values, "mean", marks=p.marks) for p in ONE_OF_EACH), ("cosine", "none")],
)
def test_the_loss_is_one_operator(name, reduction):
    """No graph break: in one graph it gives the loss and gradients that it gives outside."""
    torch.compiler.reset()  # or the compilations of the other heads count
    torch.manual_seed(0)
    head, h, y = (
        HarmonicHead(C, 128, name, real_vocab_size=V).eval(),
        torch.randn(N, C),
        torch.arange(N),
    )
    y[3] = IGNORE_INDEX

    def loss(x):
        return (head.loss(2 * x, y, reduction=reduction) * torch.arange(1, N + 1)).mean()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = h.clone().requires_grad_()
        value = function(x)
        found.append((value, *torch.autograd.grad(value, (x, *head.parameters()))))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("link", ["harmonic", "softmax"])
def test_a_schedule_of_the_strength_does_not_compile_each_value(link):
    torch.compiler.reset()
    torch.manual_seed(0)
    head, h, y = HarmonicHead(C, V, "cosine", link=link), torch.randn(N, C), torch.arange(N)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: head.loss(2 * x, y), fullgraph=True, backend=counter)
    for step in range(12):
        setattr(head, head.strength_name, 8 + step / 2)
        torch.testing.assert_close(compiled(h), head.loss(2 * h, y))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "settings",
    [
        [{}],
        [{"skip": skip} for skip in (1e-5, 1e-4, 1e-3)],
        [{"ignore_index": index} for index in (3, 4, 5)],
        [{"name": "minkowski", "p": p} for p in (3.0, 5.0, 7.0)],
    ],
)
def test_other_sizes_and_settings_compile(settings, dynamic):
    """Of the second value of a number, torch.compile makes a symbol."""
    torch.compiler.reset()
    torch.manual_seed(0)

    def loss(h, w, y, name="euclidean", **settings):
        return harmonic_loss(h, w, y, name, **settings)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for v, how in [(V, settings[0]), (V + 1, settings[0]), (V + 3, settings[0])] + [
        (V, how) for how in settings[1:]
    ]:
        h, w = (torch.randn(v, C, requires_grad=True) for _ in range(2))
        found, expected = (f(h, w, torch.arange(v), **how) for f in (compiled, loss))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x, w)[0] for x in (found, expected)))


@pytest.mark.parametrize("name", ["manhattan", "mahalanobis"])
def test_a_models_loss_is_exported(name):
    """torch.export of a module that returns the loss."""

    class Trained(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = torch.nn.Linear(C, C), HarmonicHead(C, V, name)

        def forward(self, x, y):
            return self.head.loss(self.trunk(x), y)

    torch.manual_seed(0)
    model, x, y = Trained().eval(), torch.randn(N, C), torch.arange(N)
    program = torch.export.export(model, (x, y))
    torch.testing.assert_close(program.module()(x, y), model(x, y))
    # A table that is frozen at the export can be trained later.
    model.head.requires_grad_(False)
    program = torch.export.export(model, (x, y)).module()
    gradients = {}
    for trained in (program, model):  # They share their parameters.
        trained.zero_grad()
        trained.requires_grad_(True)(x, y).backward()
        gradients[trained] = {name: p.grad.clone() for name, p in trained.named_parameters()}
    torch.testing.assert_close(gradients[program], gradients[model])


def test_contributions_are_exported():
    class Shares(torch.nn.Module):
        def forward(self, h, w, factor):
            return contributions(h, w, "mahalanobis", factor=factor)

    torch.manual_seed(0)
    given = torch.randn(N, C), torch.randn(N, C), torch.randn(C, C)
    program = torch.export.export(Shares(), given)
    torch.testing.assert_close(program.module()(*given), Shares()(*given), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["euclidean", "manhattan", "cosine"])
def test_compiled_logits_equal_eager_ones(name):
    """With a matrix product, a compiled kernel and a compiled map: all are called as they are."""
    torch.manual_seed(0)
    head = HarmonicHead(C, V, name)
    h = torch.randn(N, C)
    found = []
    for function in (head, torch.compile(head, backend="aot_eager")):
        logits = function(h)
        found.append((logits, *torch.autograd.grad(logits.square().mean(), head.weight)))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("name", ["euclidean", "mahalanobis"])
def test_transposed_states_with_an_ignored_target_compile(name):
    """The compiler has to know the strides of all gradients. Those of mahalanobis's factor are of
    a Cholesky factor, which LAPACK writes by columns."""
    head, x = HarmonicHead(16, 50, name), torch.randn(1, 16, 6)
    targets = torch.tensor([[1, 2, -100, 3, 4, 5]])
    found = []
    for function in (head.loss, torch.compile(head.loss, fullgraph=True)):
        states = x.clone().requires_grad_()
        loss = function(states.transpose(1, 2), targets)
        found.append(torch.autograd.grad(loss, (states, *head.parameters())))
    torch.testing.assert_close(*found)


def test_the_dense_loss_is_called_as_it_is():
    """It looks at values, so torch.compile must not trace it."""
    torch.manual_seed(0)
    head = HarmonicHead(C, V, "euclidean", impl="dense")
    h, y = torch.randn(N, C), torch.arange(N)
    compiled = torch.compile(lambda x: head.loss(x * 1.0, y), backend="aot_eager")
    torch.testing.assert_close(compiled(h), head.loss(h, y))
