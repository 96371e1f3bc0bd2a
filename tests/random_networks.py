"""Random networks: small, traceable by torch.fx, with many operations that channels pass through.

A network is written as Python source. Each line is executed as soon as it is written, so that the
shapes of tensors are looked up and never computed. `source(seed)` returns the class, ready for a
bug report.
"""

import random
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import StochasticDepth


class OwnNorm1d(nn.BatchNorm1d):
    """A user's batch norm class whose forward() only calls torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class OwnNorm2d(nn.BatchNorm2d):
    """A user's batch norm class that applies an activation after torch's forward()."""

    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(input), 0.1)


class NormAct2d(nn.BatchNorm2d):
    """A user's batch norm class that calls F.batch_norm, as timm's do, then ReLU in place."""

    def forward(self, input: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        out = F.batch_norm(input, mean, var, self.weight, self.bias, self.training, 0.1, self.eps)
        return out.relu_()


class PaddedConv(nn.Conv2d):
    """A user's class that pads left and bottom, and crops the output at the top and right."""

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(F.pad(input, (1, 0, 0, 1)))
        return out[:, :, 1:, :-1]


class CalledConv(nn.Conv2d):
    """A user's class that calls F.conv2d."""

    def forward(self, input: Tensor) -> Tensor:
        options: Any = {"padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        return F.conv2d(input, self.weight, self.bias, self.stride, **options)


class CastConv(nn.Conv2d):
    """A user's class that casts weight and bias to the input's dtype, and has an activation."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        out = self._conv_forward(input, self.weight.to(input.dtype), bias)
        return F.leaky_relu(out, 0.1)


class HalvedConv(nn.Conv2d):
    """A user's class that overrides _conv_forward(), and halves its result."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = 0.5 * super()._conv_forward(input, weight, bias)
        return out


class CentredConv(nn.Conv2d):
    """A user's class that subtracts from each row of its weight the row's mean."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        out: Tensor = self._conv_forward(input, weight, self.bias)
        return out


class AddedConv(nn.Conv2d):
    """A user's class that reads its weight twice, and its number of groups."""

    def forward(self, input: Tensor) -> Tensor:
        beside: Tensor = (self.weight**2).sum((1, 2, 3)).view(-1, 1, 1)
        return super().forward(input) * self.groups + beside


class DoubledLinear(nn.Linear):
    """A user's class that doubles the output of torch's forward()."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class CosineLinear(nn.Linear):
    """A user's class that multiplies with a normalised copy of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, F.normalize(self.weight, dim=1, eps=0.1), self.bias)


class GatedUp(nn.ConvTranspose2d):
    """A user's class that multiplies its output by a sigmoid of it."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        out = super().forward(input, output_size)
        return out * torch.sigmoid(out)


_OWN: dict[str, list[type[nn.Module]]] = {
    "nn.Conv2d": [
        nn.Conv2d, PaddedConv, CalledConv, CastConv, HalvedConv, CentredConv, AddedConv,
    ],
    "nn.Linear": [nn.Linear, DoubledLinear, CosineLinear],
    "nn.ConvTranspose2d": [nn.ConvTranspose2d, GatedUp],
}  # fmt: skip
_NAMES: dict[str, Any] = {
    kind.__name__: kind for kinds in _OWN.values() for kind in kinds[1:]
} | {
    "torch": torch, "nn": nn, "F": F, "StochasticDepth": StochasticDepth,
    "OwnNorm1d": OwnNorm1d, "OwnNorm2d": OwnNorm2d, "NormAct2d": NormAct2d,
}  # fmt: skip

# An activation's value at 0 decides whether a channel of zeros is still zero after it.
_ACTIVATIONS = (
    "nn.ReLU()", "nn.ReLU()", "nn.ReLU6()", "nn.SiLU()", "nn.GELU()", "nn.Hardswish()",
    "nn.LeakyReLU(0.1)", "nn.Tanh()", "nn.ELU()", "nn.Identity()", "F.relu({})", "torch.relu({})",
    "{}.relu()", "F.gelu({})", "F.leaky_relu({}, 0.2)", "torch.tanh({})", "F.hardswish({})",
)  # fmt: skip
_SOMETHING_OF_NOTHING = (
    "nn.Sigmoid()", "nn.Hardsigmoid()", "nn.Softplus()", "torch.sigmoid({})", "{}.sigmoid()",
    "F.hardsigmoid({})",
)  # fmt: skip
_IN_PLACE = (
    "nn.ReLU(inplace=True)", "nn.ReLU6(inplace=True)", "nn.SiLU(inplace=True)",
    "nn.Hardswish(inplace=True)", "nn.LeakyReLU(0.1, inplace=True)", "nn.ELU(inplace=True)",
    "nn.Hardsigmoid(inplace=True)", "F.relu({}, inplace=True)", "{}.relu_()", "torch.relu_({})",
)  # fmt: skip
_ARITHMETIC = (
    "0.5 * {}", "{} * 2", "{} / 3", "-{}", "{} + 0.5", "1 - {}", "{} - 0.25", "1 + {}",
    "{}.mul(0.7)", "torch.add({}, 0.3)", "{}.add(0)", "{}.div(2)",
)  # fmt: skip
_POOLING = (
    "nn.MaxPool2d(2)", "nn.AvgPool2d(2)", "nn.MaxPool2d(3, 1, 1)", "nn.AvgPool2d(3, 1, 1)",
    "nn.AdaptiveAvgPool2d(2)", "nn.AdaptiveMaxPool2d(2)", "F.max_pool2d({}, 2)",
    "F.avg_pool2d({}, 2)", "F.adaptive_avg_pool2d({}, 2)",
)  # fmt: skip
_TO_ONE_PIXEL = (
    "{}.mean((2, 3), keepdim=True)", "torch.mean({}, dim=[2, 3], keepdim=True)",
    "F.adaptive_avg_pool2d({}, 1)", "nn.AdaptiveAvgPool2d(1)", "{}.mean((-2, -1), keepdim=True)",
    "F.adaptive_max_pool2d({}, 1)", "{}.amax((2, 3), keepdim=True)",
)  # fmt: skip
_NOTHING_MUCH = (
    "nn.Dropout(0.0)", "nn.Dropout2d(0.0)", "F.dropout({}, 0.0)", "nn.Identity()",
    "StochasticDepth(0.0, 'row')", "StochasticDepth(0.0, 'batch')", "{}.contiguous()",
    "F.dropout({}, 0.0, self.training)", "F.pad({}, (1, 0, 0, 1))", "{} * 1",
)  # fmt: skip
_COMBINATION = (
    "{} + {}", "{} + {}", "{} + {}", "{} - {}", "{} * {}", "torch.add({}, {})", "{}.add({})",
    "torch.mul({}, {})", "{}.sub({})", "torch.add({}, {}, alpha=2)",
)  # fmt: skip
_UPSAMPLING = (
    "nn.Upsample(scale_factor=2)", "F.interpolate({}, scale_factor=2)",
    "F.interpolate({}, size=(6, 6), mode='bilinear')",
    "F.interpolate({}, scale_factor=2.0, mode='bilinear', align_corners=False)",
)  # fmt: skip
_FLATTEN = (
    "torch.flatten({}, 1)", "{}.flatten(1)", "nn.Flatten()", "{0}.view({0}.size(0), -1)",
    "{0}.reshape({0}.shape[0], -1)", "{}.mean((2, 3))", "{}.mean([2, 3])", "{}.amax((2, 3))",
    "F.adaptive_avg_pool2d({}, 1).flatten(1)", "{}.mean(3).mean(2)",
    "{}.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1)",
)  # fmt: skip
# Operations that are not followed, or only with care. The channels that an unfollowed operation
# reads or makes cannot be removed.
_STRANGE = (
    "F.softmax({}, 1)", "{}.softmax(dim=1)", "nn.Softmax(1)", "{}.flip(1)", "{}.roll(1, 1)",
    "{0} * {0}.amax(1, keepdim=True)", "{0} - {0}.mean(1, keepdim=True)", "torch.cos({})",
    "{}.transpose(1, 2).contiguous().transpose(1, 2)",
    "{}.transpose(2, 3)", "{}.cumsum(1)", "{0} + {0}[:, :1]",
    "torch.cat([{0}[:, [0, 0]], {0}], 1)", "torch.cat([{0}[:, ::2], {0}[:, 1::2]], 1)",
)  # fmt: skip


_ASSIGNMENTS = (
    "{}[:, :, 0] = 0.25", "{}[:, :1] = -0.5", "{0}[:, :, :1] = {0}[:, :, -1:].clone()",
    "{}[:, :1] += 1",
)  # fmt: skip


class _DoesNotFitError(Exception):
    """No tensor made so far can be the input of this operation."""


class _Writer:
    """Writes a network line by line, and executes each line.

    Attributes:
        maps: names of the (batch, channels, height, width) tensors made so far.
        vectors: names of the (batch, features) tensors.
        unread: names of tensors that nothing has read yet, in order.
        fresh: those of them that may be changed in place without breaking backpropagation.
        own_classes: whether layers and batch norms are of users' own classes.
    """

    def __init__(self, seed: int, own_classes: bool) -> None:
        self.own_classes = own_classes
        self.random = random.Random(seed)
        channels, space = self.random.choice((1, 2, 3, 4)), self.random.choice((4, 6, 8))
        self.input = torch.randn(2, channels, space, space)
        self.values: dict[str, Any] = _NAMES | {"self": nn.Module(), "x": self.input}
        self.parts: list[str] = []
        self.lines: list[str] = []
        self.maps: list[str] = []
        self.vectors: list[str] = []
        self.unread: dict[str, None] = {}
        self.fresh: set[str] = set()
        self.tensors = 0
        self.operations: dict[Callable[[], None], float] = {
            self.convolution: 6, self.grouped: 2, self.depthwise: 2, self.transposed: 1,
            self.norm: 5, self.activation: 6, self.prelu: 1, self.arithmetic: 1.5,
            self.combination: 4, self.residual: 2, self.bottleneck: 1, self.concatenation: 2,
            self.split: 1.5, self.shuffle: 0.5, self.squeeze_excitation: 1.5, self.layer_scale: 1,
            self.offset: 0.3, self.pooling: 1.5, self.one_pixel: 0.7, self.upsampling: 0.7,
            self.nothing_much: 1, self.vector: 1, self.linear: 2, self.channels_last: 1,
            self.tokens: 0.5, self.group_norm: 0.4, self.strange: 0.5, self.twice: 0.5,
            self.shared: 0.4, self.in_place: 1.5, self.gate_of_one_channel: 0.3,
            self.linear_over_width: 0.1, self.again: 0.3,
        }  # fmt: skip

    def write(self) -> str:
        """Write a whole network and return its source."""
        self.offer(self.conv("x", self.random.randint(2, 8)))
        self.maps.insert(0, "x")
        wanted = self.random.randint(4, 12)
        while wanted:
            names, weights = list(self.operations), list(self.operations.values())
            (operation,) = self.random.choices(names, weights)
            try:
                operation()
            except _DoesNotFitError:
                continue
            wanted -= 1
        self.lines.append(f"return {self.outputs()}")
        init, forward = ("\n        ".join(lines) for lines in (self.parts, self.lines))
        return (
            "class Network(nn.Module):\n"
            "    def __init__(self):\n        super().__init__()\n"
            f"        {init}\n\n"
            f"    def forward(self, x):\n        {forward}\n"
        )

    # --- writing lines ----------------------------------------------------------------------------

    def part(self, name: str, expression: str) -> str:
        """Add a module or parameter to the network, and return how forward() refers to it."""
        target = f"self.{name}{len(self.parts)}"
        kind, _, options = expression.partition("(")
        if self.own_classes and kind in _OWN:
            own = _OWN[kind][len(self.parts) % len(_OWN[kind])].__name__
            expression = f"{kind if kind.endswith(own) else own}({options}"
        self.parts.append(f"{target} = {expression}")
        exec(self.parts[-1], self.values)
        return target

    def run(self, line: str) -> None:
        """Add a line to forward(), execute it, and note which tensors it reads."""
        for name in re.findall(r"\bt\d+\b", line):
            self.unread.pop(name, None)
            self.fresh.discard(name)
        self.lines.append(line)
        exec(line, self.values)

    def let(self, expression: str) -> str:
        """Assign an expression to a new tensor, and return its name."""
        return self.let_many(expression, 1)[0]

    def let_many(self, expression: str, count: int) -> list[str]:
        """Assign an expression to `count` new tensors, and return their names."""
        names = [f"t{self.tensors + i}" for i in range(count)]
        self.tensors += count
        self.run(f"{', '.join(names)} = {expression}")
        return names

    def call(self, template: str, name: str) -> str:
        """Return an expression that applies `template` to a tensor.

        The template has {} for the tensor, or else makes a module, which is added to the network.
        """
        if "{" in template:
            return template.format(name)
        kind = re.findall(r"\w+", template.removeprefix("nn."))[0].lower()
        return f"{self.part(kind, template)}({name})"

    def offer(self, name: str, fresh: bool = False) -> None:
        """Let later operations read this tensor."""
        (self.maps if len(self.shape(name)) == 4 else self.vectors).append(name)
        self.unread[name] = None
        if fresh:
            self.fresh.add(name)

    # --- choosing ---------------------------------------------------------------------------------

    def chance(self, of: float) -> bool:
        return self.random.random() < of

    def shape(self, name: str) -> tuple[int, ...]:
        value = self.values[name]
        assert isinstance(value, Tensor)
        return tuple(value.shape)

    def channels(self, name: str) -> int:
        return self.shape(name)[1]

    def pick(
        self, fits: Callable[[tuple[int, ...]], bool] = lambda _: True, among: str = "maps"
    ) -> str:
        """Return the name of a tensor that fits; mostly the last one that was made."""
        found = [name for name in getattr(self, among) if fits(self.shape(name))]
        if not found:
            raise _DoesNotFitError
        return str(found[-1] if self.chance(0.6) else self.random.choice(found))

    def pick_pair(self) -> tuple[str, str]:
        """Return the names of two tensors of the same shape, sometimes the same name twice."""
        first = self.pick(among=self.random.choice(("maps", "maps", "maps", "vectors")))
        others = [
            name
            for name in (*self.maps, *self.vectors)
            if self.shape(name) == self.shape(first) and (name != first or self.chance(0.1))
        ]
        if not others:
            raise _DoesNotFitError
        return first, self.random.choice(others)

    def width(self, near: str) -> int:
        """Return a number of channels: often that of another tensor, so that they can be added."""
        others = [self.channels(name) for name in self.maps] or [4]
        return self.random.choice(
            (self.random.randint(2, 8), self.random.choice(others), self.channels(near))
        )

    # --- pieces -----------------------------------------------------------------------------------

    def conv(self, name: str, out: int, groups: int = 1, same: bool = False) -> str:
        height, width = self.shape(name)[2:]
        kernel = 3 if self.chance(0.6) and min(height, width) >= 2 else 1
        stride = 2 if not same and min(height, width) >= 4 and self.chance(0.2) else 1
        options = f"{self.channels(name)}, {out}, {kernel}"
        options += f", stride={stride}" * (stride > 1)
        options += f", padding={kernel // 2}" * (kernel > 1)
        options += f", groups={groups}" * (groups > 1)
        options += ", bias=False" * self.chance(0.4)
        options += ", padding_mode='circular'" * (kernel > 1 and self.chance(0.1))
        return self.let(f"{self.part('conv', f'nn.Conv2d({options})')}({name})")

    def batch_norm(self, name: str) -> str:
        options = f"{self.channels(name)}, eps=0.01" + ", affine=False" * self.chance(0.1)
        rank = 2 if len(self.shape(name)) == 4 else 1
        kind = "nn.BatchNorm"
        if self.own_classes:
            kind = "NormAct" if rank == 2 and len(self.parts) % 2 else "OwnNorm"
        return self.let(f"{self.part('bn', f'{kind}{rank}d({options})')}({name})")

    def activate(self, name: str) -> str:
        in_place = name in self.fresh and self.chance(0.4)
        some = _SOMETHING_OF_NOTHING if self.chance(0.2) else _ACTIVATIONS
        return self.let(self.call(self.random.choice(_IN_PLACE if in_place else some), name))

    def block(self, name: str, out: int, same: bool = False) -> str:
        """Write a convolution, perhaps a norm and perhaps an activation; return the last name."""
        name = self.conv(name, out, same=same)
        if self.chance(0.7):
            name = self.batch_norm(name)
        return self.activate(name) if self.chance(0.7) else name

    # --- operations -------------------------------------------------------------------------------

    def convolution(self) -> None:
        name = self.pick()
        self.offer(self.conv(name, self.width(name), same=self.chance(0.6)), fresh=True)

    def grouped(self) -> None:
        name = self.pick(lambda shape: shape[1] in (4, 6, 8))
        inputs = self.channels(name)
        groups = self.random.choice([g for g in (2, 3, 4) if inputs % g == 0 and inputs > g])
        out = inputs if self.chance(0.5) else groups * self.random.randint(1, 8 // groups)
        self.offer(self.conv(name, out, groups, same=self.chance(0.7)), fresh=True)

    def depthwise(self) -> None:
        name = self.pick(lambda shape: 2 <= shape[1] <= 8)
        inputs = self.channels(name)
        multiplier = 2 if inputs <= 4 and self.chance(0.4) else 1
        name = self.conv(name, multiplier * inputs, inputs, same=self.chance(0.7))
        self.offer(name, fresh=True)

    def transposed(self) -> None:
        name = self.pick(lambda shape: shape[2] <= 4)
        inputs, out = self.channels(name), self.width(name)
        groups = 2 if inputs % 2 == 0 and out % 2 == 0 and self.chance(0.2) else 1
        options = f"{inputs}, {out}, {self.random.choice(('2, stride=2', '3, padding=1', '1'))}"
        options += f", groups={groups}" * (groups > 1) + ", bias=False" * self.chance(0.4)
        layer = self.part("up", f"nn.ConvTranspose2d({options})")
        self.offer(self.let(f"{layer}({name})"), fresh=True)

    def norm(self) -> None:
        among = "vectors" if self.vectors and self.chance(0.1) else "maps"
        self.offer(self.batch_norm(self.pick(among=among)), fresh=not self.own_classes)

    def activation(self) -> None:
        name = self.pick(among="vectors" if self.vectors and self.chance(0.2) else "maps")
        result = self.activate(name)
        if self.values[result].data_ptr() == self.values[name].data_ptr() and self.chance(0.6):
            # Otherwise later operations may read the changed tensor under its old name too.
            self.maps = [n for n in self.maps if n != name]
        self.offer(result)

    def prelu(self) -> None:
        name = self.pick()
        count = self.random.choice((1, self.channels(name)))
        self.offer(self.let(self.call(f"nn.PReLU({count})", name)))

    def arithmetic(self) -> None:
        name = self.pick(among="vectors" if self.vectors and self.chance(0.2) else "maps")
        self.offer(self.let(self.random.choice(_ARITHMETIC).format(name)))

    def combination(self) -> None:
        first, second = self.pick_pair()
        form = self.random.choice(_COMBINATION)
        name = self.let(form.format(first, second))
        self.offer(name, fresh="+" in form)

    def residual(self) -> None:
        name = self.pick()
        inner = self.block(name, self.random.randint(2, 8), same=True)
        if self.chance(0.5):
            inner = self.block(inner, self.channels(name), same=True)
        else:
            inner = self.batch_norm(self.conv(inner, self.channels(name), same=True))
        name = self.let(self.random.choice((f"{name} + {inner}", f"{inner} + {name}")))
        self.offer(self.activate(name) if self.chance(0.5) else name)

    def bottleneck(self) -> None:
        """Write an inverted bottleneck: wide, depthwise, perhaps squeeze-excitation, narrow."""
        name = self.pick(lambda shape: shape[1] <= 6)
        inner = self.activate(self.batch_norm(self.conv(name, 8, same=True)))
        inner = self.activate(self.batch_norm(self.conv(inner, 8, groups=8, same=True)))
        if self.chance(0.5):
            inner = self.excite(inner)
        inner = self.batch_norm(self.conv(inner, self.channels(name), same=True))
        self.offer(self.let(f"{name} + {inner}"))

    def concatenation(self) -> None:
        name = self.pick(lambda shape: shape[1] <= 6)
        shape = self.shape(name)
        others = [
            other
            for other in self.maps
            if self.shape(other)[2:] == shape[2:] and self.channels(other) + shape[1] <= 8
        ]
        if not others:
            raise _DoesNotFitError
        parts = [name, self.random.choice(others)]
        self.random.shuffle(parts)
        forms = ("torch.cat([{}], 1)", "torch.cat(({}), dim=1)", "torch.cat([{}], dim=-3)")
        self.offer(self.let(self.random.choice(forms).format(", ".join(parts))))

    def split(self) -> None:
        """Split a tensor, write blocks for some of its parts, and mostly concatenate them again."""
        name = self.pick(lambda shape: shape[1] >= 4)
        inputs = self.channels(name)
        size = self.random.randint(1, inputs - 1)
        if inputs % 2 == 0 and self.chance(0.5):
            form = f"({name}, 2, 1)" if self.chance(0.5) else f"({name}, 2, dim=1)"
            parts = self.let_many(f"torch.chunk{form}", 2)
        elif self.chance(0.5):
            parts = self.let_many(f"torch.split({name}, [{size}, {inputs - size}], 1)", 2)
        elif inputs % 2 == 0:
            parts = self.let_many(f"{name}.split({inputs // 2}, dim=1)", 2)
        else:
            parts = [self.let(f"{name}[:, :{size}]"), self.let(f"{name}[:, {size}:]")]
        branches = [
            self.block(part, self.channels(part), same=True) if self.chance(0.5) else part
            for part in parts
        ]
        if self.chance(0.7):
            self.random.shuffle(branches)
            branches = [self.let(f"torch.cat([{', '.join(branches)}], 1)")]
        for branch in branches:
            self.offer(branch)

    def shuffle(self) -> None:
        name = self.pick(lambda shape: shape[1] in (4, 6, 8))
        groups = 3 if self.channels(name) == 6 and self.chance(0.5) else 2
        self.run(f"b, c, h, w = {name}.{self.random.choice(('shape', 'size()'))}")
        name = self.let(f"{name}.view(b, {groups}, c // {groups}, h, w).transpose(1, 2)")
        last = self.random.choice(("contiguous().view(b, -1, h, w)", "reshape(b, c, h, w)"))
        self.offer(self.let(f"{name}.{last}"))

    def excite(self, name: str) -> str:
        gate = self.let(self.call(self.random.choice(_TO_ONE_PIXEL), name))
        inner = self.part("squeeze", f"nn.Conv2d({self.channels(name)}, 3, 1)")
        gate = self.let(
            self.call(self.random.choice(("F.relu({})", "nn.SiLU()")), f"{inner}({gate})")
        )
        outer = self.part("excite", f"nn.Conv2d(3, {self.channels(name)}, 1)")
        end = self.random.choice(("torch.sigmoid({})", "nn.Hardsigmoid()", "{}.sigmoid()"))
        gate = self.let(self.call(end, f"{outer}({gate})"))
        return self.let(self.random.choice((f"{name} * {gate}", f"{gate} * {name}")))

    def squeeze_excitation(self) -> None:
        self.offer(self.excite(self.pick()))

    def layer_scale(self) -> None:
        name = self.pick()
        shape = self.random.choice(("{}, 1, 1", "1, {}, 1, 1")).format(self.channels(name))
        scale = self.part("scale", f"nn.Parameter(torch.randn({shape}))")
        name = self.let(self.random.choice((f"{name} * {scale}", f"{scale} * {name}")))
        self.offer(name, fresh=True)

    def offset(self) -> None:
        name = self.pick()
        shift = self.part("shift", f"nn.Parameter(torch.randn({self.channels(name)}, 1, 1))")
        self.offer(self.let(f"{name} + {shift}"))

    def pooling(self) -> None:
        name = self.pick(lambda shape: min(shape[2:]) >= 4)
        self.offer(self.let(self.call(self.random.choice(_POOLING), name)))

    def one_pixel(self) -> None:
        name = self.pick(lambda shape: shape[2] > 1)
        pixel = self.let(self.call(self.random.choice(_TO_ONE_PIXEL), name))
        if self.chance(0.5):
            pixel = self.let(f"{name} {self.random.choice('+-*')} {pixel}")
        self.offer(pixel)

    def upsampling(self) -> None:
        name = self.pick(lambda shape: shape[2] <= 4)
        form = self.random.choice(_UPSAMPLING)
        self.offer(self.let(self.call(form, name)))

    def nothing_much(self) -> None:
        self.offer(self.let(self.call(self.random.choice(_NOTHING_MUCH), self.pick())))

    def flat(self, name: str) -> str:
        flatten = self.random.choice(_FLATTEN)
        if ".view(" in flatten and not self.values[name].is_contiguous():
            flatten = "torch.flatten({}, 1)"
        return self.let(self.call(flatten, name))

    def vector(self) -> None:
        self.offer(self.flat(self.pick(lambda shape: shape[1] * shape[2] * shape[3] <= 256)))

    def linear(self) -> None:
        name = self.pick(among="vectors")
        out = self.channels(name) if self.chance(0.3) and self.channels(name) <= 8 else 5
        options = f"{self.channels(name)}, {out}" + ", bias=False" * self.chance(0.3)
        layer = self.part("linear", f"nn.Linear({options})")
        self.offer(self.let(f"{layer}({name})"), fresh=True)

    def over_last(self, name: str, channels: int) -> str:
        """Write a few operations on a tensor with channels last, and return the result's name."""
        if self.chance(0.5):
            name = self.let(f"{self.part('ln', f'nn.LayerNorm({channels}, eps=0.01)')}({name})")
        if self.chance(0.8):
            inner = self.random.randint(2, 8)
            first = self.part("linear", f"nn.Linear({channels}, {inner})")
            bias = ", bias=False" * self.chance(0.3)
            second = self.part("linear", f"nn.Linear({inner}, {channels}{bias})")
            old, name = name, self.let(f"{first}({name})")
            name = self.let(f"{second}({self.call(self.random.choice(_ACTIVATIONS), name)})")
            if self.chance(0.3):
                name = self.let(f"{name} + {old}")
        if self.chance(0.3):
            scale = self.part("gamma", f"nn.Parameter(torch.randn({channels}))")
            name = self.let(f"{scale} * {name}")
        return name

    def channels_last(self) -> None:
        """Write operations with the channels on the last axis, as in ConvNeXt."""
        name = self.pick()
        inner = self.over_last(self.let(f"{name}.permute(0, 2, 3, 1)"), self.channels(name))
        inner = self.let(f"{inner}.permute(0, 3, 1, 2)")
        self.offer(self.let(f"{name} + {inner}") if self.chance(0.5) else inner)

    def tokens(self) -> None:
        """Write operations on tokens as in a vision transformer, but without attention."""
        name = self.pick()
        channels = self.channels(name)
        inner = self.let(f"{name}.flatten(2).transpose(1, 2)")
        inner = self.over_last(inner, channels)
        if self.chance(0.4):
            self.offer(self.let(f"{inner}.mean(1)"))
        else:
            height, width = self.shape(name)[2:]
            back = self.random.choice(
                (f"reshape({name}.shape)", f"unflatten(2, ({height}, {width}))")
            )
            self.offer(self.let(f"{inner}.transpose(1, 2).{back}"))

    def group_norm(self) -> None:
        name = self.pick(lambda shape: shape[2] > 1)
        groups = self.random.choice([g for g in (1, 2, 3, 4, 8) if self.channels(name) % g == 0])
        norm = f"nn.GroupNorm({groups}, {self.channels(name)}, eps=0.01)"
        if self.chance(0.2):
            norm = f"nn.InstanceNorm2d({self.channels(name)}, eps=0.01)"
        self.offer(self.let(self.call(norm, name)))

    def strange(self) -> None:
        name = self.pick(lambda shape: shape[1] >= 2 and shape[2] == shape[3])
        self.offer(self.let(self.call(self.random.choice(_STRANGE), name)))

    def twice(self) -> None:
        """Call one layer or norm on two tensors, or on its own output."""
        name = self.pick()
        channels = self.channels(name)
        others = [n for n in self.maps if self.channels(n) == channels and n != name]
        module = self.part(
            "twice",
            self.random.choice(
                (f"nn.Conv2d({channels}, {channels}, 1)", f"nn.BatchNorm2d({channels}, eps=0.01)")
            ),
        )
        first = self.let(f"{module}({name})")
        other = self.random.choice(others) if others and self.chance(0.5) else first
        self.offer(first)
        self.offer(self.let(f"{module}({other})"))

    def shared(self) -> None:
        """Write two layers that share their weight or their bias."""
        name = self.pick()
        channels = self.channels(name)
        first = self.part("first", f"nn.Conv2d({channels}, {channels}, 1)")
        second = self.part("second", f"nn.Conv2d({channels}, {channels}, 1)")
        attribute = self.random.choice(("weight", "weight", "bias"))
        self.parts.append(f"{second}.{attribute} = {first}.{attribute}")
        exec(self.parts[-1], self.values)
        name = self.let(f"{first}({name})")
        self.offer(self.let(f"{second}({self.activate(name)})"))

    def again(self) -> None:
        """Call an activation module that was made before."""
        name = self.pick()
        used = [p.split(" = ")[0] for p in self.parts if re.search(r"nn\.(ReLU|SiLU|GELU)\(\)", p)]
        if not used:
            raise _DoesNotFitError
        self.offer(self.let(f"{self.random.choice(used)}({name})"))

    def in_place(self) -> None:
        """Change a tensor in place, and let later operations read it and an alias made before."""
        names = [name for name in self.maps if name in self.fresh]
        if not names:
            raise _DoesNotFitError
        name = self.random.choice(names)
        shape = self.shape(name)
        others = [n for n in self.maps if n != name and self.shape(n)[2:] == shape[2:]]
        amount = "0.5"
        if others and self.chance(0.9):
            amount = self.random.choice(others)
            if self.shape(amount) != shape or self.chance(0.3):
                amount = self.conv(amount, shape[1], same=True)
        aliases = ("{}", "{}", "{}[:, :1]", "{0}.view({0}.shape)", "nn.Identity()")
        alias = self.let(self.call(self.random.choice(aliases), name))
        changes = ("{} += {}", "{} += {}", "{}.add_({})", "{} -= {}", *_ASSIGNMENTS)
        change = self.random.choice(changes)
        self.run(change.format(name, amount))
        self.maps.remove(name)
        self.offer(name)
        self.offer(alias)

    def gate_of_one_channel(self) -> None:
        """Write spatial attention: all channels are multiplied by a gate of one channel."""
        name = self.pick()
        gate = self.let(f"torch.sigmoid({self.conv(name, 1, same=True)})")
        self.offer(self.let(f"{name} * {gate}"))

    def linear_over_width(self) -> None:
        """Write a linear layer over the width of a map, whose inputs are not channels."""
        name = self.pick()
        width = self.shape(name)[3]
        self.offer(self.let(f"{self.part('linear', f'nn.Linear({width}, {width})')}({name})"))

    # --- outputs ----------------------------------------------------------------------------------

    def outputs(self) -> str:
        """Write heads for the tensors that nothing has read, and return what forward() returns.

        This is a sum of head outputs, perhaps with some of those tensors. Other heads are unused.
        """
        leaves = list(self.unread)
        sums, more = [], []
        for i, name in enumerate(reversed(leaves)):
            way = "sum" if i == 0 else self.random.choice(("sum", "sum", "output", "nowhere"))
            if way == "output":
                more.append(name)
                continue
            flat = self.flat(name) if len(self.shape(name)) == 4 else name
            layer = self.part("head", f"nn.Linear({self.channels(flat)}, 3)")
            value = self.let(f"{layer}({flat})")
            if way == "sum":
                sums.append(value)
        result = self.let(" + ".join(sums)) if len(sums) > 1 else sums[0]
        if not more:
            return result
        together = ", ".join((result, *more))
        named = ", ".join(f"'{name}': {name}" for name in (result, *more))
        return self.random.choice((f"({together})", f"[{together}]", f"{{{named}}}"))


def source(seed: int, own_classes: bool = False) -> str:
    """Return a class named Network as Python source."""
    return _written(seed, own_classes)[0]


def build(seed: int, own_classes: bool = False) -> tuple[nn.Module, Tensor]:
    """Return a random network in float64 and training mode, and an input for it."""
    text, example = _written(seed, own_classes)
    names = dict(_NAMES)
    exec(text, names)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: nn.Module = names["Network"]().double()
        for module in model.modules():
            affine = getattr(module, "weight", None) is not None
            if isinstance(module, nn.GroupNorm | nn.LayerNorm | _BatchNorm) and affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
            if isinstance(module, _BatchNorm):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, nn.PReLU):
                module.weight.uniform_(-0.5, 0.5)
        return model, torch.randn(example.shape, dtype=torch.float64)


def _written(seed: int, own_classes: bool) -> tuple[str, Tensor]:
    """Return a network's source, and an input of the shape that it takes."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        writer = _Writer(seed, own_classes)
        return writer.write(), writer.input
