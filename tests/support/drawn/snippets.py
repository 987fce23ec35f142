"""What drawn modules are made of: layers and endings, as the plain code a person would write.

In a layer's code `x` is [rows, width] and stays so. `{n}` is the layer's number, `{w}` the width, `{s}` a size that is
drawn. Attributes are named after the number (`self.l3`, `self.p3`), so that layers can be frozen and tied by name.
"""

from dataclasses import dataclass

_WEIGHT = "{to}.l{n}.weight = {of}.l{m}.weight"
_PARAMETER = "{to}.p{n} = {of}.p{m}"


@dataclass(frozen=True)
class Snippet:
    """One kind of layer.

    tie: shares the parameters of layer `{m}` of `{of}` with layer `{n}` of `{to}`; empty if there are none.
    by_row: a row of the result depends on its own row of the batch alone, parameters and rows counted out.
    random: draws random numbers. tokens: reads the integer input ``t`` [rows, 3]. coarse: computes in bfloat16.
    """

    init: str
    forward: str
    tie: str = ""
    by_row: bool = True
    random: bool = False
    tokens: bool = False
    coarse: bool = False


def _linear(forward: str, init: str = "self.l{n} = nn.Linear({w}, {w})", **flags: bool) -> Snippet:
    return Snippet(init, forward, _WEIGHT, **flags)


def _parameter(shape: str, forward: str, **flags: bool) -> Snippet:
    return Snippet(f"self.p{{n}} = nn.Parameter(torch.randn({shape}))", forward, _PARAMETER, **flags)


def _buffer(value: str, forward: str, *, persistent: bool = True, by_row: bool = True) -> Snippet:
    more = "" if persistent else ", persistent=False"
    return Snippet(f'self.register_buffer("b{{n}}", {value}{more})', forward, by_row=by_row)


def _code(forward: str, **flags: bool) -> Snippet:
    return Snippet("", forward, **flags)


LINEARS = {
    "linear": _linear("x = torch.tanh(self.l{n}(x))"),
    "linear without bias": _linear("x = x + self.l{n}(x)", "self.l{n} = nn.Linear({w}, {w}, bias=False)"),
    "mlp": Snippet(
        "self.l{n} = nn.Linear({w}, {s})\nself.m{n} = nn.Linear({s}, {w})",
        "x = self.m{n}(F.gelu(self.l{n}(x)))",
        _WEIGHT,
    ),
    "linear there and back": _linear(
        "x = torch.tanh(self.l{n}(x)) @ self.l{n}.weight", "self.l{n} = nn.Linear({w}, {s})"
    ),
    "wide linear": _linear(
        "x = self.l{n}(x.to(self.l{n}.weight.dtype)).to(x.dtype)", "self.l{n} = nn.Linear({w}, {w}).double()"
    ),
    "narrow linear": _linear(
        "x = self.l{n}(x.to(self.l{n}.weight.dtype)).to(x.dtype)",
        "self.l{n} = nn.Linear({w}, {w}).bfloat16()",
        coarse=True,
    ),
    "autocast": _linear(
        'with torch.autocast("cpu", torch.bfloat16):\n    y = self.l{n}(x)\nx = y.to(x.dtype)', coarse=True
    ),
    "no_grad": _linear("with torch.no_grad():\n    y = self.l{n}(x)\nx = x * 0.5 + y"),
    "detached": _linear("x = x + self.l{n}(x.detach())"),
    "in training alone": _linear("if self.training:\n    x = x + self.l{n}(x)"),
    "called three times": _linear("for _ in range(3):\n    x = torch.tanh(self.l{n}(x))"),
    "weight norm": Snippet(
        "self.l{n} = nn.utils.parametrizations.weight_norm(nn.Linear({w}, {w}))", "x = self.l{n}(x)"
    ),
}

PARAMETERS = {
    "scalar": _parameter("()", "x = x * self.p{n}"),
    "one element": _parameter("1", "x = x * self.p{n} + 1"),
    "one row": _parameter("1, 1, {w}", "x = x + self.p{n}[0]"),
    "no rows": _parameter("0, {w}", "x = x + self.p{n}.sum(0)"),
    "rows": _parameter("{s}, {w}", "x = x * self.p{n}.mean(0)"),
    "transposed": Snippet(
        "self.p{n} = nn.Parameter(torch.randn({s}, {w}).t())",
        "x = torch.sigmoid(x @ self.p{n}) @ self.p{n}.t()",
        _PARAMETER,
    ),
    "strided": Snippet("self.p{n} = nn.Parameter(torch.randn({w}, 6)[:, ::2])", "x = x + self.p{n}.sum(1)", _PARAMETER),
    "sliced": _parameter("{s} + 2, {w}", "x = x * self.p{n}[1:-1].sum(0) + self.p{n}[0]"),
    "never used": _parameter("{s}, 3", "pass"),
    "with its own square": _parameter("{w}", "x = x * self.p{n} + self.p{n} * self.p{n}"),
    "integer": Snippet(
        "self.p{n} = nn.Parameter(torch.arange({w}).flip(0), requires_grad=False)", "x = x[:, self.p{n}]", _PARAMETER
    ),
}

NORMS = {
    "layer norm": _linear("x = self.l{n}(x)", "self.l{n} = nn.LayerNorm({w})"),
    "rms norm": _linear("x = self.l{n}(x)", "self.l{n} = nn.RMSNorm({w})"),
    "group norm": _linear("x = self.l{n}(x.unsqueeze(2)).squeeze(2)", "self.l{n} = nn.GroupNorm(1, {w})"),
    "batch norm": _linear("x = self.l{n}(x)", "self.l{n} = nn.BatchNorm1d({w})"),
    "batch norm, slow": _linear("x = self.l{n}(x)", "self.l{n} = nn.BatchNorm1d({w}, momentum=0.01)"),
    "batch norm, bare": Snippet("self.l{n} = nn.BatchNorm1d({w}, affine=False)", "x = self.l{n}(x)"),
    "batch norm, no statistics": _linear(
        "x = self.l{n}(x)", "self.l{n} = nn.BatchNorm1d({w}, track_running_stats=False)"
    ),
    "batch norm, images": _linear(
        "x = self.l{n}(x.view(-1, {w}, 1, 1).expand(-1, -1, 2, 1)).mean((2, 3))", "self.l{n} = nn.BatchNorm2d({w})"
    ),
    "instance norm": _linear(
        "x = self.l{n}(torch.stack([x, -2 * x, x * x], 2))[:, :, 0]",  # far apart, for the norm magnifies rounding
        "self.l{n} = nn.InstanceNorm1d({w}, affine=True)",
    ),
}

CONVOLUTIONS = {
    "conv1d": _linear("x = self.l{n}(x.unsqueeze(1)).mean(1)", "self.l{n} = nn.Conv1d(1, {s}, 3, padding=1)"),
    "conv2d": _linear(
        "x = self.l{n}(x.view(-1, 1, 1, {w})).amax(1).view(-1, {w})",
        "self.l{n} = nn.Conv2d(1, {s}, (1, 3), padding=(0, 1), bias=False)",
    ),
    "depthwise": _linear(
        "x = self.l{n}(x.unsqueeze(2).expand(-1, -1, 3)).squeeze(2)", "self.l{n} = nn.Conv1d({w}, {w}, 3, groups={w})"
    ),
    "transposed conv": _linear(
        "x = self.l{n}(x.unsqueeze(1))[:, :, 1:-1].sum(1)", "self.l{n} = nn.ConvTranspose1d(1, {s}, 3)"
    ),
}

ATTENTION = {
    "embedding": _linear("x = x + self.l{n}(t).mean(1)", "self.l{n} = nn.Embedding(7, {w})", tokens=True),
    "embedding with padding": _linear(
        "x = x + self.l{n}(t).sum(1)", "self.l{n} = nn.Embedding(7, {w}, padding_idx=0)", tokens=True
    ),
    "embedding and head": _linear(
        "x = torch.softmax(F.linear(x, self.l{n}.weight), 1) @ self.l{n}.weight + self.l{n}(t)[:, 0]",
        "self.l{n} = nn.Embedding(7, {w})",
        tokens=True,
    ),
    "attention": _parameter(
        "4", "y = x.unsqueeze(2) * self.p{n}\nx = F.scaled_dot_product_attention(y, y.cos(), y).mean(2)"
    ),
    "attention with dropout": _parameter(
        "4",
        "y = x.view(-1, 1, {w}, 1) * self.p{n}\n"
        "x = F.scaled_dot_product_attention(y, y, y, dropout_p=0.25).mean((1, 3))",
        random=True,
    ),
    "causal attention": _parameter(
        "4",
        "y = x.view(-1, 1, {w}, 1) * self.p{n}\n"
        "x = F.scaled_dot_product_attention(y, y, y, is_causal=True)[:, 0, :, 0]",
    ),
    "multihead": Snippet(
        "self.l{n} = nn.MultiheadAttention(4, 2, batch_first=True)\nself.p{n} = nn.Parameter(torch.randn(4))",
        "y = x.unsqueeze(2) * self.p{n}\nx = self.l{n}(y, y, y, need_weights=False)[0].mean(2)",
        _PARAMETER,
    ),
    "attention over rows": _code("x = torch.softmax(x @ x.t(), 1) @ x", by_row=False),
}

BUFFERS = {
    "counter": _buffer("torch.zeros((), dtype=torch.long)", "self.b{n} += 1\nx = x * (1 + 1 / self.b{n})"),
    "counter that nobody reads": _buffer("torch.zeros(1, dtype=torch.int32)", "self.b{n}.add_(2)"),
    "running mean": _buffer(
        "torch.zeros({w})",
        "self.b{n}.mul_(0.9).add_(x.detach().mean(0).to(self.b{n}.dtype), alpha=0.1)\nx = x - self.b{n}.to(x.dtype)",
        by_row=False,
    ),
    "running mean, read before": _buffer(
        "torch.zeros({w})",
        "y = x - self.b{n}.to(x.dtype)\nself.b{n}.copy_(x.detach().mean(0) + self.b{n})\nx = y * 0.5",
        by_row=False,
    ),
    "running mean, assigned": _buffer(
        "torch.zeros({w})",
        "self.b{n} = 0.5 * self.b{n} + x.detach().amax(0).to(self.b{n}.dtype)\nx = x + self.b{n}.to(x.dtype)",
        by_row=False,
    ),
    "one row of a buffer": _buffer(
        "torch.zeros(3, {w})", "self.b{n}[1] = x.detach().sum(0)\nx = x + self.b{n}.sum(0).to(x.dtype)", by_row=False
    ),
    "mask": _buffer("torch.arange({w}) % 3 == 0", "x = x.masked_fill(self.b{n}, 0.5)"),
    "mask that flips": _buffer(
        "torch.arange({w}) % 2 == 0", "self.b{n}.logical_not_()\nx = torch.where(self.b{n}.clone(), x, -x)"
    ),
    "positions": _buffer("torch.arange({w}).flip(0)", "x = x[:, self.b{n}]", persistent=False),
    "running scale, not saved": _buffer(
        "torch.ones(())", "x = x / self.b{n}.to(x.dtype, copy=True)\nself.b{n}.mul_(1.5)", persistent=False
    ),
    "buffer of two names": Snippet(
        'self.register_buffer("b{n}", torch.ones({w}))\nself.register_buffer("c{n}", self.b{n})',
        "x = x * self.c{n}.to(x.dtype) + self.b{n}.to(x.dtype)",
    ),
    "saved, then changed": _buffer(
        "torch.ones({w})", "y = x * self.b{n}.to(x.dtype, copy=True)\nself.b{n}.mul_(2)\nx = y.tanh()"
    ),
}

DROPOUTS = {
    "dropout": Snippet("self.l{n} = nn.Dropout(0.25)", "x = self.l{n}(x)", random=True),
    "dropout in place": Snippet("self.l{n} = nn.Dropout(0.5, inplace=True)", "x = self.l{n}(x * 2)", random=True),
    "dropout, function": _code("x = F.dropout(x, 0.1, self.training) + x", random=True),
    "dropout of two": _code("x = F.dropout(x, 0.5, self.training) - F.dropout(x, 0.5, self.training)", random=True),
    "alpha dropout": Snippet("self.l{n} = nn.AlphaDropout(0.25)", "x = self.l{n}(x)", random=True),
    "channel dropout": Snippet(
        "self.l{n} = nn.Dropout1d(0.5)", "x = self.l{n}(x.unsqueeze(1)).squeeze(1)", random=True
    ),
    "bernoulli": _code("x = x * torch.bernoulli(torch.full_like(x, 0.75))", random=True),
    "dropout of a weight": _linear("x = F.linear(x, F.dropout(self.l{n}.weight, 0.25))", random=True),
}

IN_PLACE = {
    "relu_": _code("x = (x * 2).relu_()"),
    "relu module": Snippet("self.l{n} = nn.ReLU(inplace=True)", "x = self.l{n}(x + 0.1)"),
    "add_": _parameter("{w}", "x = x * 3\nx.add_(self.p{n})"),
    "addcmul_": _parameter("{w}", "x = x + 1\nx.addcmul_(self.p{n}, self.p{n}, value=0.5)"),
    "mul_ on a column": _parameter("()", "x = x.clone()\nx[:, :1].mul_(self.p{n})"),
    "mul_ on a transpose": _code("x = x + 0\nx.t().mul_(0.5)"),
    "add_ through a view": _parameter("1", "x = x * 1.5\nx.view(-1).add_(self.p{n})"),
    "view, then base": _code("x = x * 2\ny = x[:, -1]\nx.add_(1)\nx = x * y.unsqueeze(1).tanh()"),
    "base, then view": _code(
        "x = x * 2\ny = x.view(-1)\ny.sub_(0.5)\ny[:1] = 0.25\nx = x + y.view_as(x)", by_row=False
    ),
    "column assignment": _parameter("()", "x = x * 1\nx[:, 0] = self.p{n}"),
    "row assignment": _code("x = x.clone()\nx[-1] = 0", by_row=False),
    "masked assignment": _code("y = x * 2\ny[y > 0.5] = 0.5\nx = y"),
    "fill": _parameter("{w}", "y = torch.zeros_like(x)\ny.copy_(self.p{n})\nx = x + y"),
    "filled column by column": _code(
        "y = torch.empty_like(x)\nfor i in range({w}):\n    y[:, i] = x[:, -1 - i]\nx = y"
    ),
    "index_add_": _code("y = x.clone()\ny.index_add_(1, torch.tensor([0]), x[:, -1:])\nx = y"),
    "scatter_": _code("x = x.clone().scatter_(1, torch.zeros_like(x[:, :1], dtype=torch.long), 0.5)"),
    "tanh_ of a sum": _code("x = (x + x.sin()).tanh_()"),
    "exp_ and saved": _code("y = x.clamp(max=2).exp_()\nx = y * y.sigmoid()"),
    "hardtanh_": _code("x = F.hardtanh_(x * 2)"),
    "zero_ under no_grad": _code("y = x.detach().clone()\nwith torch.no_grad():\n    y.zero_().add_(1)\nx = x * y"),
    "in-place on a chunk": _code(
        "x = x * 2\ny = x.unsqueeze(2).expand(-1, -1, 2).contiguous()\ny.select(2, 1).mul_(3)\nx = y.sum(2)"
    ),
}

SHAPES = {
    "pass": _code("pass"),
    "contiguous transpose": _code("x = x.t().contiguous().t()"),
    "expand": _code("x = x.unsqueeze(0).expand(2, -1, -1).mean(0)"),
    "flip": _code("x = x.flip(1) + x"),
    "chunks": _code("y, z = torch.cat([x, x.cos()], 1).chunk(2, 1)\nx = y * z"),
    "stack": _code("x = torch.stack([x, x * 2, x.sin()]).unbind()[1]"),
    "where": _code("x = torch.where(x > 0, x, 0.1 * x)"),
    "sort": _code("x = x.sort(1, descending=True).values"),
    "top": _code("x = x - x.topk(1, 1).values"),
    "cumsum": _code("x = x.cumsum(1) / {w}"),
    "logsumexp": _code("x = x - torch.logsumexp(x, 1, keepdim=True)"),
    "norm": _code("x = x / (1 + x.norm(dim=1, keepdim=True))"),
    "einsum": _parameter("{w}, {s}", 'x = torch.einsum("rw,ws,vs->rv", x, self.p{n}, self.p{n})'),
    "pad": _code("x = F.pad(x, (1, 1))[:, 1:-1]"),
    "constant": _code("x = x * torch.tensor([0.5]).to(x.dtype)"),
    "arange": _code("x = x + torch.arange({w}, device=x.device)"),
    "mean over rows": _code("x = x - x.mean(0)", by_row=False),
    "flip of rows": _code("x = x + x.flip(0)", by_row=False),
    "cumulative rows": _code("x = x.cumsum(0) * 0.5", by_row=False),
    "roll of rows": _code("x = x + torch.roll(x, 1, 0)", by_row=False),
}

LAYERS: dict[str, Snippet] = {
    **SHAPES, **LINEARS, **PARAMETERS, **NORMS, **CONVOLUTIONS, **ATTENTION, **BUFFERS, **DROPOUTS, **IN_PLACE,
}  # fmt: skip


@dataclass(frozen=True)
class Ending:
    """What `forward` returns; `given` is the float input. whole: a batch's loss is the mean of its rows' losses."""

    code: str
    whole: bool = False


ENDINGS: dict[str, Ending] = {
    "loss": Ending("return x.square().mean()", whole=True),
    "rows": Ending("return x"),
    "loss and rows": Ending("return x.square().mean(), x", whole=True),
    "dict": Ending('return {"loss": x.sin().mean(), "logits": x, "best": x.argmax(1)}', whole=True),
    "without gradient": Ending("return x.tanh().mean(), x.detach(), x > 0", whole=True),
    "two losses": Ending("return x.mean(), x.square().sum()"),
    "rows and their transpose": Ending("return x, x.t()"),
    "a part of the other": Ending("return x[:, :1], x"),
    "the same twice": Ending("return x, x"),
    "the input": Ending("return x.square().mean(), given", whole=True),
    "a view of the input": Ending("return x.cos().mean(), given.t()", whole=True),
    "nested": Ending('return {"a": (x * 2, [x.sum()]), "b": None, "c": 3, "d": "text"}'),
    "nothing to differentiate": Ending("return x.detach() * 2"),
    "integers": Ending("return (x > 0).sum(), x.sum(1)"),
    "a sum of squares by row": Ending("return x.square().sum(1)"),
    "a number of its own": Ending("return x.mean() + 1, torch.ones(2)", whole=True),
}
